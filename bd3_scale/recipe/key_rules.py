"""What a single key may be: its choices, and the range of a number. `rules.py` has what several keys need of each other."""

from __future__ import annotations

DATA_FORMATS = ("mds", "webdataset")

CHOICES = {
    "run.resume": ("auto", "never", "fresh"),
    "run.device": ("auto", "cpu", "cuda"),
    "model.positions": ("rotary", "learned"),
    "model.attention_bias": ("none", "query_key_value", "all"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.mlp": ("gelu", "swiglu"),
    "model.conditioning": ("none", "adaln"),
    "model.attention": ("auto", "flex", "flex_triton", "flex_flash", "tiled", "dense"),
    "model.head_loss": ("eager", "fused"),
    "objective.clean_half": ("block_causal", "causal"),
    "data.format": DATA_FORMATS,
    "data.source": (None, "documentation"),
    "data.row_special": ("none", "bos", "bos_eos"),
    "training.schedule": ("constant", "cosine", "wsd"),
    "training.precision": ("auto", "bf16", "fp32"),
    "training.recompute": ("none", "attention", "mlp", "layer"),
    "training.compile": ("none", "blocks", "max-autotune"),
    "parallel.zero": (0, 1, 2, 3),
    "parallel.engine": ("auto", "deepspeed", "megatron", "fsdp"),
    "tracking.wandb": ("online", "offline", "disabled"),
}

REFUSED_CHOICES = {
    ("training.precision", "fp16"): "its range needs loss scaling, which is not built in, and bf16 needs no loss scaling; "
    "set training.precision=bf16",
}
"""Values that people expect to work, each with why it does not."""

POSITIVE = (
    "run.time_limit", "run.threads",
    "model.context", "model.layers", "model.hidden", "model.heads", "model.conditioning_size", "model.key_value_heads", "model.mlp_hidden",
    "model.initial_std", "model.rotary_base", "model.head_width", "model.norm_epsilon",
    "data.source_tokens", "data.window", "data.cache_bytes", "training.steps", "training.tokens", "training.global_batch",
    "training.learning_rate", "training.epsilon",
    "validation.rows", "parallel.tensor", "parallel.pipeline",
    "parallel.virtual_stages", "parallel.context", "parallel.shard", "parallel.micro_batch", "parallel.timeout", "parallel.heartbeat",
    "tracking.every",
)  # fmt: skip
NOT_NEGATIVE = (
    "run.seed", "training.weight_decay", "training.warmup", "training.clip", "training.spike_deviations", "training.skipped_in_a_row",
    "training.ema", "training.decay", "training.rewarmup", "validation.every", "checkpoint.every", "checkpoint.keep",
    "checkpoint.keep_every", "checkpoint.patience", "checkpoint.remote_keep", "parallel.hang",
    "data.prefetch", "data.download_ahead", "model.dropout", "tracking.sample_tokens",
)  # fmt: skip
