"""The paper's published weights (Arriola et al. 2025): BD3-LM at L' = 4, 8, 16 and L, MDLM, AR; HF form or Lightning checkpoint.

The names are those of its DiT: LayerNorm without bias, fused q, k, v, GELU with biases, adaLN where the network is conditioned
on the noise level (sigma = 0 always). Shapes are read from the tensors; what no shape shows (heads, context, block size) from
config.json, and where that does not say it, from the paper. Its vocabulary holds MASK as last id, as ours does.
Invariant: the tuned interval that stands beside the network becomes the recipe's and the tuner's.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from bd3_scale.convert.key_map import KeyMap, Piece, Rule
from bd3_scale.convert.source import Source, TorchFile
from bd3_scale.errors import CheckpointError
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.schema import ModelConfig, ObjectiveConfig
from bd3_scale.tuning.interval_tuner import TunerState

MODEL_TYPES = ("bd3lm", "mdlm")
PREFIX = "backbone."
PAPER = {"n_heads": 12, "model_length": 1024}
EMBEDDING = "vocab_embed.embedding"
INTERVAL = ("sampling_eps_min", "sampling_eps_max")
HYPER_PARAMETERS = {"n_heads": ("model", "n_heads"), "model_length": ("model", "length"), "block_size": ("block_size",),
                    "dropout": ("model", "dropout")}  # fmt: skip
"""Where a Lightning checkpoint's own configuration has what config.json says."""


def _linear(ours: str, theirs: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{ours}.{what}", (Piece(f"{theirs}.{what}"),)) for what in ("weight", "bias"))


def _map(conditioned: bool) -> KeyMap:
    block, qkv = "blocks.{}", "blocks.{}.attn_qkv.weight"
    adaptive = (
        (*_linear("condition.mlp.0", "sigma_map.mlp.0"), *_linear("condition.mlp.2", "sigma_map.mlp.2"),
         *_linear("final_modulation", "output_layer.adaLN_modulation")),
        _linear(f"{block}.modulation", f"{block}.adaLN_modulation"),
    ) if conditioned else ((), ())  # fmt: skip
    return KeyMap(
        whole=(
            Rule("embedding.weight", (Piece(EMBEDDING),)),
            Rule("final_norm.weight", (Piece("output_layer.norm_final.weight"),)),
            *_linear("head", "output_layer.linear"),
            *adaptive[0],
        ),
        layer=(
            Rule(f"{block}.attention_norm.weight", (Piece(f"{block}.norm1.weight"),)),
            Rule(f"{block}.attention.query.weight", (Piece(qkv, part=(0, 3)),)),
            Rule(f"{block}.attention.key_value.weight", (Piece(qkv, part=(1, 3)), Piece(qkv, part=(2, 3))), "heads"),
            Rule(f"{block}.attention.output.weight", (Piece(f"{block}.attn_out.weight"),)),
            Rule(f"{block}.mlp_norm.weight", (Piece(f"{block}.norm2.weight"),)),
            *_linear(f"{block}.mlp.up", f"{block}.mlp.0"),
            *_linear(f"{block}.mlp.down", f"{block}.mlp.2"),
            *adaptive[1],
        ),
        prefixes=(PREFIX, ""),
        no_use=r"(backbone\.)?(rotary_emb\.inv_freq|block_diff_mask)|(sampling_eps_min|sampling_eps_max|noise\..*|metrics\..*)",
    )


def recognised(shapes: Any) -> bool:
    """Whether these are names of the paper's network."""
    return EMBEDDING in shapes or PREFIX + EMBEDDING in shapes


def describe(source: Source, config: dict[str, Any]) -> tuple[Recipe, KeyMap, dict[str, Any]]:
    """(recipe, names, state of the tuner) of the source. Raises CheckpointError."""
    shapes, prefix = source.shapes, PREFIX if PREFIX + EMBEDDING in source.shapes else ""
    config = {**PAPER, **_hyper_parameters(source), **{key: value for key, value in config.items() if value is not None}}

    def shape(name: str) -> tuple[int, ...]:
        if prefix + name not in shapes:
            raise CheckpointError(f"{source.path}: tensor {prefix + name} is missing")
        return shapes[prefix + name]

    layers = [int(found[1]) for name in shapes if (found := re.match(re.escape(prefix) + r"blocks\.(\d+)\.", name))]
    conditioned = prefix + "sigma_map.mlp.0.weight" in shapes
    context = int(config["model_length"])
    model = ModelConfig(
        context=context,
        layers=max(layers, default=-1) + 1,
        hidden=shape(EMBEDDING)[1],
        heads=int(config["n_heads"]),
        mlp_hidden=shape("blocks.0.mlp.0.weight")[0],
        mlp_bias=True,
        head_bias=True,
        conditioning="adaln" if conditioned else "none",
        conditioning_size=shape("sigma_map.mlp.2.weight")[0] if conditioned else ModelConfig.conditioning_size,
        dropout=float(config.get("dropout", 0.1)),
    )
    interval = _interval(source)
    objective = _objective(source, config, conditioned, context, interval)
    tuner = TunerState(int(config.get("block_size") or context), interval)
    return replace(Recipe(), model=model, objective=objective), _map(conditioned), tuner.to_dict()


def _objective(source: Source, config: dict[str, Any], conditioned: bool, context: int, interval: tuple[float, float]) -> ObjectiveConfig:
    if config.get("model_type") == "mdlm":
        return ObjectiveConfig("mdlm", interval=interval)
    if config.get("causal") or (not conditioned and "block_size" not in config):
        return ObjectiveConfig("ar")
    if config.get("block_size") is None:
        raise CheckpointError(
            f"{source.path}: nothing says which block size the network was trained with; put the config.json of the weights beside them "
            f"or name it: --block-size 4 (--block-size {context} for the pre-trained network)"
        )
    return ObjectiveConfig("bd3", int(config["block_size"]), interval)


def _interval(source: Source) -> tuple[float, float]:
    found = [float(source.read(name).item()) if name in source.shapes else None for name in INTERVAL]
    beta, omega = found
    # The pre-trained networks hold [1e-3, 1] or nothing; buffers are fp32, whose 0.001 is not the decimal one.
    return (1e-3 if beta is None else round(beta, 6), 1.0 if omega is None else round(omega, 6))


def _hyper_parameters(source: Source) -> dict[str, Any]:
    """What a Lightning checkpoint says of itself, where it could be read at all."""
    document = source.content if isinstance(source, TorchFile) else None
    saved = document.get("hyper_parameters") if isinstance(document, dict) else None
    saved = saved.get("config", saved) if isinstance(saved, dict) else None
    found: dict[str, Any] = {}
    for key, path in HYPER_PARAMETERS.items():
        value: Any = saved
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, (int, float)):
            found[key] = value
    return found
