"""A Hugging Face directory that SGLang and LMDeploy serve: block diffusion in the shape of Qwen3, `SDARForCausalLM`.

What the servers' files read (sglang 0.5.23: srt/models/sdar.py, srt/dllm/config.py; lmdeploy 0.18.0: pytorch/models/sdar.py,
pytorch/configurations/sdar.py): the shape, biases, base of the rotary positions and the ids of ends from config.json, tensors by Qwen3's
names. MASK is 151669 in both, whatever a config says; the block size is an option of theirs, and stands here for people.

The servers take the most probable of all ids, MASK among them, which our objective never scores. Invariant: they never take MASK: its row
of the head is the mean of all others, so its logit is the mean of theirs, at most their largest. (A tied head is therefore untied.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.convert.causal import llama_map
from bd3_scale.convert.export import HUB, Exported, Opened, Tensors, open_checkpoint, whole, write_tensors
from bd3_scale.convert.key_map import Rule, full_name, separate
from bd3_scale.data.tokenizer_files import write_tokenizer
from bd3_scale.errors import RecipeError
from bd3_scale.recipe.schema import ModelConfig
from bd3_scale.recipe.text import as_yaml

MASK_ID = 151669
"""MASK, as the servers have it: the id after those of Qwen3's tokenizer."""
CONFIGURATION = "configuration_sdar.py"
SHAPE: dict[str, tuple[Any, ...]] = {
    "positions": ("rotary",),
    "attention_bias": ("none", "all"),
    "query_key_norm": (True,),
    "query_key_norm_width": ("head",),
    "norm": ("rmsnorm",),
    "norm_place": ("before",),
    "mlp": ("swiglu",),
    "mlp_bias": (False,),
    "conditioning": ("none",),
    "head_bias": (False,),
    "rotary_scaling": (None,),
    "rotary_local": (None,),
    "unrotated_every": (None,),
}
"""Keys of `model` -> what the servers' network can hold."""


def directory(path: str | Path, out: Path, *, weights: str = "auto") -> Exported:
    """Write the directory. Raises RecipeError where the servers cannot hold the network, or another UserError."""
    opened = open_checkpoint(path, weights)
    _require(opened)

    def write(folder: Path) -> None:
        folder.mkdir()
        write_tensors(folder / "model.safetensors", _tensors(opened), {"format": "pt"})
        write_tokenizer(opened.tokenizer, folder, opened.recipe.model.context)
        (folder / "config.json").write_text(json.dumps(_config(opened), indent=1) + "\n", "utf-8")
        ends = {"eos_token_id": opened.tokenizer.end_of_text, "bos_token_id": opened.tokenizer.end_of_text}
        generation = {**ends, "mask_token_id": MASK_ID, "block_length": opened.objective.block_size}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", "utf-8")
        (folder / CONFIGURATION).write_bytes((HUB / CONFIGURATION).read_bytes())

    whole(out, write)
    return opened.exported


def _require(opened: Opened) -> None:
    model, objective, mask = opened.recipe.model, opened.objective, opened.tokenizer.mask_id
    if objective.kind != "bd3" or objective.pattern.clean_half != "block_causal":
        raise RecipeError(
            f"objective.kind={objective.kind} with a {objective.pattern.clean_half} clean half is nothing that SDAR's servers decode; they "
            "take objective.kind=bd3 with objective.clean_half=block_causal"
        )
    shape = ", ".join(f"model.{key}={as_yaml(values[0])}" for key, values in SHAPE.items())
    for key, allowed in SHAPE.items():
        if (value := getattr(model, key)) not in allowed:
            raise RecipeError(
                f"model.{key}={value} does not fit into the network of SDAR's servers, which has {' or '.join(map(str, allowed))}; "
                f"train a network of Qwen3's shape (import one, or set {shape}), "
                "or export a directory of our own"
            )
    if mask != MASK_ID:
        raise RecipeError(
            f"MASK is id {mask} of data.tokenizer={opened.recipe.data.tokenizer}, but SDAR's servers have {MASK_ID} in their code; "
            "train with the tokenizer of Qwen3, whose ids end just before it, or export a directory of our own"
        )


def _config(opened: Opened) -> dict[str, Any]:
    """Every key that a server's model file reads, and what libraries ask of any config."""
    model, ends = opened.recipe.model, opened.tokenizer.end_of_text
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "auto_map": {"AutoConfig": f"{CONFIGURATION.removesuffix('.py')}.SDARConfig"},
        "hidden_size": model.hidden,
        "intermediate_size": model.mlp_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "attention_bias": model.attention_bias == "all",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "max_position_embeddings": model.context,
        "sliding_window": None,
        "vocab_size": opened.tokenizer.model_vocabulary_size,
        "tie_word_embeddings": False,
        "bos_token_id": ends,
        "eos_token_id": ends,
        "pad_token_id": ends,
        "mask_token_id": MASK_ID,
        "block_size": opened.objective.block_size,
        "torch_dtype": "bfloat16",
    }


def _tensors(opened: Opened) -> Tensors:
    """Foreign name -> (shape, how to make it), one of ours at a time."""
    model, checkpoint, kind = opened.recipe.model, opened.checkpoint, opened.kind
    shapes = checkpoint.shapes(kind)
    found: Tensors = {}
    for rule in llama_map(model).rules(model.layers):
        parts = len(rule.pieces)
        shape = (shapes[rule.name][0] // parts, *shapes[rule.name][1:])
        for place, piece in enumerate(rule.pieces):
            found[full_name("model.", piece.name)] = shape, _maker(checkpoint, kind, rule, place, model)
    embedding = "embedding.weight" if model.tied_head else "head.weight"
    found["lm_head.weight"] = shapes[embedding], lambda: with_mean_for_mask(checkpoint.read(kind, embedding))
    return found


def _maker(checkpoint: Checkpoint, kind: str, rule: Rule, place: int, model: ModelConfig) -> Any:
    return lambda: separate(rule, checkpoint.read(kind, rule.name), model.head_size)[place]


def with_mean_for_mask(head: torch.Tensor) -> torch.Tensor:
    """The rows of a head [V, hidden], the last, MASK's, the mean of all others."""
    return torch.cat([head[:-1], head[:-1].mean(0, dtype=torch.float64, keepdim=True).float()])
