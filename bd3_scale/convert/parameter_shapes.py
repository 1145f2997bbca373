"""Names and full shapes of a network's parameters, from its configuration alone: no network is made to convert one.

Invariant: equal to `Transformer(...).named_parameters()` of one process (a test holds the two together).
"""

from __future__ import annotations

from bd3_scale.costs.flops import SINUSOIDS
from bd3_scale.recipe.schema import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: ModelConfig, vocabulary: int) -> Shapes:
    """Canonical name -> shape; `vocabulary` is V, MASK included."""
    hidden, conditioned = config.hidden, config.conditioning == "adaln"
    shapes: Shapes = {"embedding.weight": (vocabulary, hidden)}
    if config.positions == "learned":
        shapes["positions.weight"] = (config.context, hidden)
    for layer in range(config.layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _layer(config).items()}
    if conditioned:
        size = config.conditioning_size
        shapes |= _linear("condition.mlp.0", size, SINUSOIDS, True) | _linear("condition.mlp.2", size, size, True)
        shapes |= _linear("final_modulation", 2 * hidden, size, True)
    shapes |= _norm("final_norm", config)
    if not config.tied_head:
        shapes["head.weight"] = (vocabulary, hidden)
    if config.head_bias:
        shapes["head.bias"] = (vocabulary,)
    return shapes


def _layer(config: ModelConfig) -> Shapes:
    hidden, width, bias = config.hidden, config.heads * config.head_size, config.attention_bias
    shapes = _norm("attention_norm", config) | _norm("mlp_norm", config)
    shapes |= _linear("attention.query", width, hidden, bias != "none")
    shapes |= _linear("attention.key_value", 2 * config.kv_heads * config.head_size, hidden, bias != "none")
    shapes |= _linear("attention.output", hidden, width, bias == "all")
    if config.query_key_norm:
        shapes |= {"attention.query_norm.weight": (config.head_size,), "attention.key_norm.weight": (config.head_size,)}
    up = config.mlp_size * (2 if config.mlp == "swiglu" else 1)
    shapes |= _linear("mlp.up", up, hidden, config.mlp_bias) | _linear("mlp.down", hidden, config.mlp_size, config.mlp_bias)
    if config.conditioning == "adaln":
        shapes |= _linear("modulation", 6 * hidden, config.conditioning_size, True)
    return shapes


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if bias else weight


def _norm(name: str, config: ModelConfig) -> Shapes:
    weight: Shapes = {f"{name}.weight": (config.hidden,)}
    return weight | {f"{name}.bias": (config.hidden,)} if config.norm_bias else weight
