"""Every key of a recipe: its type, default and meaning, a dataclass for each section.

Invariants: nothing here depends on the number of ranks or on a device; a section is plain data that omegaconf reads and writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bd3_scale.recipe.objective_kinds import ROW_MULTIPLE, SELECTED_MULTIPLE
from bd3_scale.recipe.shares import Shares

if TYPE_CHECKING:
    from bd3_scale.data.tokenizer import Tokenizer
    from bd3_scale.objectives.table import Objective


@dataclass
class RunConfig:
    """Who this run is."""

    name: str = "bd3"
    dir: str = "runs/${run.name}"
    seed: int = 0
    resume: str = "auto"
    """auto (continue the newest checkpoint) | never (refuse if there is one) | fresh (needs an empty directory)."""
    time_limit: float | None = None
    """Seconds of wall clock, counted from the start of the process, after which the run saves its state and leaves with status 0."""
    amend: list[str] = field(default_factory=list)
    """Keys of the recipe, such as [training.learning_rate, data.skip], that may change where a run is continued. Without its name here a
    change is refused. From that step on the new value is the run's: written into checkpoints and metrics, and whoever continues it must
    have it, too. As long as a key is named, it may change again, also back."""
    device: str = "auto"
    """auto (cuda where there is one) | cpu | cuda."""
    threads: int | None = None
    """CPU threads of each process; null: OMP_NUM_THREADS where it was set by hand, else the cores shared by the processes of a host."""


@dataclass
class ModelConfig:
    """Shape of the network. Nothing here depends on how many ranks hold it."""

    context: int = 1024
    """L, data tokens per row."""
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    key_value_heads: int | None = None
    """Grouped-query attention when fewer than heads; default: heads."""
    head_width: int | None = None
    """Width of one head; default: hidden / heads."""
    positions: str = "rotary"
    """rotary | learned (a vector per position, added to the embedding: no text can be longer than `context`)."""
    attention_bias: str = "none"
    """Biases of the attention's linears: none | query_key_value | all (the output, too)."""
    query_key_norm: bool = False
    """RMSNorm over the width of every head of query and key, before they are rotated."""
    norm: str = "layernorm"
    """layernorm | rmsnorm; computed in fp32."""
    norm_bias: bool = False
    """A bias beside the weight of every LayerNorm."""
    norm_epsilon: float = 1e-5
    mlp: str = "gelu"
    """gelu (tanh form) | swiglu."""
    mlp_hidden: int | None = None
    """Default: 4 x hidden for gelu, 8/3 x hidden rounded up to a multiple of 64 for swiglu."""
    mlp_bias: bool = False
    conditioning: str = "none"
    """none | adaln (the paper's DiT form)."""
    conditioning_size: int = 128
    tied_head: bool = False
    """Share the embedding with the head."""
    head_bias: bool = False
    dropout: float = 0.0
    rotary_base: float = 10000.0
    initial_std: float = 0.02
    attention: str = "auto"
    """The kernel: auto (flex on CUDA, tiled on CPU) | flex | flex_triton | flex_flash (FlexAttention by the backend named: Triton, or
    FlashAttention 4, which must be installed; tried before the run) | tiled | dense (reference: four times the work). Changes no result."""

    head_loss: str = "eager"
    """The cross-entropy of the logits: eager (megatron-core's) | fused (compiled, which moves a sixth of the memory; not yet seen on a
    GPU). Changes no result."""

    @property
    def head_size(self) -> int:
        return self.head_width or self.hidden // self.heads

    @property
    def kv_heads(self) -> int:
        return self.key_value_heads or self.heads

    @property
    def mlp_size(self) -> int:
        if self.mlp_hidden:
            return self.mlp_hidden
        return 4 * self.hidden if self.mlp == "gelu" else -(-8 * self.hidden // 3 // 64) * 64


@dataclass
class ObjectiveConfig:
    """What is trained. Source: Arriola et al. 2025 (arXiv 2503.09573), sections 3 and 4.

    A key that its kind does not use must be left out: a value that would do nothing is a RecipeError.
    """

    kind: str = "bd3"
    """bd3 (block diffusion) | mdlm (masked diffusion: one block, one stream) | sedd (as mdlm, by score entropy, with a network
    that is told the noise: needs model.conditioning=adaln) | ssdlm (SSD-LM, Han et al. 2022: blocks as bd3, Gaussian diffusion on
    the simplex of the words, told the time: needs adaln, too; it has no likelihood) | ar (the next-token loss)."""
    block_size: Any = None
    """L', tokens per block; divides model.context. Default 4. For bd3 and ssdlm (25 in its paper, which asks for a context such as
    1000; of 1024, 16 and 32 are near). Or its schedule over training: a list of [from step, block size], such as [[0, 1024],
    [850000, 16]]; the first starts at step 0."""
    interval: tuple[float, float] = (1e-3, 1.0)
    """[beta, omega]: training draws t ~ U[beta, omega]. Validation always uses U[1e-3, 1]. Not for ar."""
    clean_half: str = "block_causal"
    """How clean tokens see each other: block_causal | causal (inside a block, too). For bd3 and ssdlm."""
    schedule: str = "linear"
    """Mask probability over time t: linear | cosine | square | sqrt | log. `interval` bounds t. The reported NELBO is always
    linear. Not for ar, nor for ssdlm, whose Gaussian noise has a cosine schedule of its own."""
    resample: bool = False
    """Keep the *realised* masked fraction of a block, not only its t, inside `interval`. Training only. With omega < 1 the
    fully masked block is then never trained, although every block starts sampling in that state; and the expected train
    loss is no longer the bound over the interval. Not for ar and ssdlm, not for L' = 1."""


@dataclass
class TunerConfig:
    """The search for [beta, omega] during training (objective.md section 4), by the variance that validation sees."""

    enabled: bool = False
    """Off: objective.interval is never changed. On: it is where the search starts, and must be one of the candidates."""
    every: int = 5000
    """Steps between tunings; each takes a validation pass on the averaged weights."""
    start_step: int = 5000
    """No tuning before this step: clipping lowers the variance but can raise the perplexity of young models."""
    margin: float = 0.02
    """The interval changes only where the variance falls by more than this fraction."""
    rows: int | None = None
    """The first so many held-out rows are used; default: all that validation uses."""


@dataclass
class SourceConfig:
    """One data set of a mixture: path, remote and format as in `data`."""

    path: str = ""
    weight: float = 1.0
    """Its share of the samples, with at most four decimals; the weights of a mixture sum up to 1."""
    remote: str | None = None
    format: str = "mds"


@dataclass
class DataConfig:
    """Where rows of tokens come from. A data folder holds `manifest.json`, `train/` and `validation/`."""

    path: str = "~/.cache/bd3_scale/data"
    """Folder of prepared rows; with `remote` set, the local cache of it."""
    remote: str | None = None
    """A folder or URL (s3://, gs://, ...) that shards are fetched from when `path` lacks them."""
    format: str = "mds"
    """mds (mosaicml-streaming) | webdataset (tar)."""
    mixture: list[SourceConfig] = field(default_factory=list)
    """Several data sets instead of `path`: [{path: A, weight: 0.7}, {path: B, weight: 0.3, remote: ..., format: ...}]. Each is read in
    its own order, epoch by epoch; validation takes held-out rows of all in the same proportions."""
    cache_bytes: int | None = None
    """The most that each local folder of a remote may hold: shards not needed soon are deleted from it. null: everything stays."""
    download_ahead: int = 16
    """Shards fetched from a remote, and opened and checked, ahead of need, after those of the current window."""
    source: str | None = None
    """What to prepare `path` from when it holds no manifest: documentation (docstrings of the installed Python packages), or nothing."""
    source_tokens: int = 4_000_000
    """At most so many tokens are prepared from `source`."""
    tokenizer: str = "gpt2"
    """gpt2 | bytes | the path of a `tokenizers` JSON file."""
    row_special: str = "bos"
    """Special tokens of each row when it is packed: none | bos | bos_eos. The paper packs OpenWebText with none, so that texts go on past
    a row, and LM1B with bos_eos, where a row, and so every text of the model, ends with an end of text."""
    window: int = 16
    """Shards that are shuffled together: larger mixes better, smaller streams better."""
    document_mask: bool = False
    """Documents that are packed into one row do not see each other; in a block where one ends, from the next block on."""
    skip: list[Any] = field(default_factory=list)
    """Ranges of samples, [[from, to], ...], that are left out: sample n is row n % training.global_batch of step n // training.global_batch
    of the run without a skip, `to` is not left out."""
    prefetch: int = 2
    """Global batches read, noised and laid out ahead of need; 0: when they are needed, by the main thread."""


@dataclass
class TrainingConfig:
    """Budget and optimizer (AdamW)."""

    steps: int | None = None
    """Optimizer steps; this or `tokens`."""
    tokens: int | None = None
    """Data tokens; rounded up to whole steps."""
    global_batch: int = 512
    """Rows per optimizer step over all ranks and micro-batches, at least one for each data-parallel rank."""
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices only."""
    warmup: int = 2500
    """Steps of linear warm-up."""
    schedule: str = "constant"
    """constant | cosine | wsd (warm-up, stable, decay), the last two to learning_rate * final_fraction at the last step."""
    final_fraction: float = 0.1
    decay: int = 0
    """wsd: the last so many steps decay, as 1 - sqrt. A decay starts from any checkpoint with training.steps = its step + decay."""
    rewarmup: int = 0
    """Steps of linear warm-up after every change of objective.block_size."""
    clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    spike_deviations: float = 0.0
    """Leave out a step whose gradient norm exceeds the mean of the last 128 by this many standard deviations (6 is usual); 0:
    only steps whose norm is not a finite number are left out."""
    skipped_in_a_row: int = 10
    """End the run when more steps than this were left out one after another."""
    ema: float = 0.9999
    """Decay of the averaged weights, ramped as min(ema, (1 + n) / (10 + n)); 0 switches them off."""
    precision: str = "auto"
    """auto (bf16 on CUDA, fp32 on CPU) | bf16 | fp32."""
    recompute: str = "none"
    """What a backward computes again instead of keeping it (activation checkpointing): none | attention (every layer's first half: norm,
    query, key, value, kernel, output) | mlp (its second half) | layer (both, from the layer's input alone)."""
    compile: str = "none"
    """torch.compile: none | blocks (each layer) | max-autotune (each layer, CUDA; its kernels chosen by timing them: minutes at the start,
    tried before the run)."""


@dataclass
class ValidationConfig:
    """NELBO on a fixed held-out set with fixed noise and the EMA weights."""

    every: int = 5000
    """Steps between validations; there is one after the last step. 0: only that one."""
    rows: int = 512
    """Held-out rows used (fewer if the set is smaller)."""


@dataclass
class TrackingConfig:
    """What is written down and where."""

    every: int = 10
    """Steps between lines of metrics.jsonl; nothing waits for the device in between."""
    wandb: str = "disabled"
    """online | offline | disabled."""
    project: str = "bd3_scale"
    entity: str | None = None
    progress: bool = True
    """A progress line on the terminal."""
    plots: bool = True
    """Draw report/*.png at validations (not so often that it slows the run) and at the end; tools/plot_run.py draws them at any time."""
    sample_tokens: int = 0
    """Tokens sampled from the last checkpoint and printed when the run ends; 0: none."""


@dataclass
class ParallelConfig:
    """How the ranks share the work. The data-parallel size is what is left of the world: world / (tensor x pipeline)."""

    tensor: int = 1
    """Ranks that share every layer: heads, MLP, vocabulary. Keep them on one node."""
    pipeline: int = 1
    """Stages that share the layers."""
    virtual_stages: int = 1
    """Slices of the layers per stage: above 1, the interleaved schedule, whose bubble is that much smaller."""
    stage_layers: list[int] | None = None
    """Layers of each of the pipeline x virtual_stages slices, in order; null: by cost (first embeds, last has the head)."""
    context: int = 1
    """Ranks that share a row. Only 1 in this version."""
    zero: int = 1
    """ZeRO stage 0-3: nothing | optimizer | + gradients | + weights divided over the data-parallel ranks."""
    engine: str = "auto"
    """Who divides and reduces: deepspeed (one pipeline stage) | megatron (megatron-core, ZeRO 0 and 1) | fsdp (torch's fully_shard, ZeRO 2
    and 3) | auto: megatron for ZeRO 0 and 1, for 2 and 3 deepspeed at one stage and fsdp at several, or where layers are compiled under
    ZeRO 3. Changes no result."""
    shard: int | None = None
    """Data-parallel ranks that share one copy of what ZeRO divides; the others replicate it (HSDP). null: all of them."""
    sequence: bool = False
    """Sequence parallelism (needs tensor > 1): norms, dropout and residuals divided over the tensor ranks along the rows."""
    micro_batch: int | None = 1
    """The most rows per forward on one replica; its share of training.global_batch is computed in as few forwards as that allows, of
    equally many rows (recipe/shares.py). null: the whole share at once."""
    timeout: int = 1800
    """Seconds after which a collective that does not finish is an error."""
    hang: int = 20
    """Times the longest step, save or validation that the run has known, two minutes at least: a rank whose main thread does nothing
    for so long is a hang, and ends the job (fault_tolerance/hang_watchdog.py). 0: only `timeout` counts."""
    heartbeat: int = 30
    """Seconds of silence after which a rank counts as dead and the whole job ends with its name (rank_monitor.py). Independent of
    how long a step takes; a rank that is killed on a host where others live is noticed within a second or so."""

    @property
    def resolved_engine(self) -> str:
        """deepspeed | megatron | fsdp: what `engine` = auto stands for in this layout."""
        if self.engine != "auto":
            return self.engine
        if self.zero <= 1:
            return "megatron"
        return "deepspeed" if self.pipeline == 1 else "fsdp"


@dataclass
class CheckpointConfig:
    """When the state is saved and how much of it is kept."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep: int = 3
    """Newest checkpoints kept; older ones are deleted. 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept for ever. 0: none are."""
    fallback: bool = False
    """Where the newest checkpoint is damaged, continue from the newest older whole one and say so, instead of ending with an error."""
    asynchronous: bool = True
    """Training waits only for a copy of the state to host memory (which must have room for it); files are written meanwhile."""
    compare_replicas: bool = True
    """Each save compares a sum of the bits of the weights over the replicas, and is an error where a rank's differ: its memory, device or
    network corrupts data in silence."""
    patience: int = 3
    """Failed saves in a row (a full disk, no permission) that only warn; one more ends the run. The last save must succeed."""
    remote: str | None = None
    """A folder as fsspec names it (s3://bucket/run, gs://...) that every finished checkpoint is copied to, by every rank its own file. A
    run without local checkpoints continues from the newest one there (`run.resume=auto`), which all ranks fetch together."""
    remote_keep: int = 0
    """Newest checkpoints kept there; older ones are deleted, but for those of `keep_every`. 0: nothing is ever deleted there."""


@dataclass
class Recipe:
    """Everything that defines a run. See each section's class for its keys."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.tokens is not None, "validate() asks for one of the two"
        return -(-self.training.tokens // self.tokens_per_step)

    def shares(self, replicas: int) -> Shares:
        """How `replicas` data-parallel ranks share the global batch."""
        return Shares(self.training.global_batch, replicas, self.parallel.micro_batch)

    def micro_batch(self, replicas: int) -> int:
        """Rows per forward where the global batch is shared by `replicas` data-parallel ranks."""
        return self.shares(replicas).micro_batch

    @property
    def tokens_per_step(self) -> int:
        """Data tokens of a global batch."""
        return self.training.global_batch * self.model.context

    def objective_at(self, tokenizer: Tokenizer, step: int, interval: tuple[float, float] | None = None, device: str = "cpu") -> Objective:
        """The objective of update `step` on `interval` (None: the recipe's), for rows of this tokenizer's ids, in shapes for `device`."""
        document_end = tokenizer.end_of_text if self.data.document_mask else None
        return self.objective_of(tokenizer.mask_id, step, device, document_end, interval)

    def objective_of(
        self, mask_id: int, step: int, device: str, document_end: int | None, interval: tuple[float, float] | None = None
    ) -> Objective:
        """As `objective_at`, where the ids are known and the tokenizer is not."""
        from bd3_scale.objectives.table import objective_at

        ranks = self.parallel.tensor if self.parallel.sequence else 1
        rows = math.lcm(ROW_MULTIPLE[device], ranks)
        selected = self.selected_multiple(device)
        return objective_at(self.objective, self.model.context, mask_id, step, interval, selected, document_end, rows)

    def selected_multiple(self, device: str) -> int:
        """What the number of selected positions of a micro-batch is padded to: sequence parallelism divides them over its ranks."""
        return math.lcm(SELECTED_MULTIPLE[device], self.parallel.tensor if self.parallel.sequence else 1)
