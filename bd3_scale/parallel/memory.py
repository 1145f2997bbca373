"""Bytes of state on one rank of a layout, from the recipe alone: parameters, gradients, masters, moments, EMA, buckets.

Tensor ranks divide the linears and the vocabulary (with its padding) and hold norms, modulations and shared key heads whole;
stages hold their layers; the data-parallel ranks of ZeRO divide what its stage says. What each engine keeps (n elements on
the rank, d data-parallel ranks, 4-byte numbers unless said otherwise; w: bytes of a weight that computes, 2 in bf16):

| engine, ZeRO | parameters | gradients | masters | moments | EMA |
|---|---|---|---|---|---|
| DeepSpeed 0 (fp32) | 4n | 4n | the parameters | 8n | 4n |
| DeepSpeed 1, fp32 | 4n | 4n | 4n/d | 8n/d | 4n/d |
| DeepSpeed 1, bf16 | 2n | 4n and 2n of the weights' own | 4n/d | 8n/d | 4n/d |
| DeepSpeed 2 | w n | 4n/d | 4n/d | 8n/d | 4n/d |
| DeepSpeed 3 | w n/d, and the small ones whole | 4n/d | 4n/d | 8n/d | 4n/d |
| megatron-core 0 (fp32) | 4n | 4n | the parameters | 8n | 4n |
| megatron-core 1 | w n | 4n | 4n/d (fp32: views of the parameters) | 8n/d | 4n/d |

DeepSpeed 3, and 1 in fp32, keep a reduce bucket while gradients are accumulated; the others have one for the time of a
backward, not counted here.
Activations and what PyTorch allocates for a moment are not counted. Invariant: a test measures every layout against this.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from bd3_scale.config import Recipe
from bd3_scale.model.config import ModelConfig
from bd3_scale.model.flops import SINUSOIDS

LARGEST_BUCKET = 200_000_000
"""Elements of DeepSpeed's reduce bucket (zero.py) where the model has as many."""
PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a parameter whole on every rank (DeepSpeed's default)."""


@dataclass(frozen=True)
class StateBytes:
    """Of one rank."""

    parameters: int
    gradients: int
    masters: int
    moments: int
    ema: int
    buckets: int
    """What communication keeps."""

    @property
    def total(self) -> int:
        return sum(astuple(self))


def stage_parameters(config: ModelConfig, vocabulary: int, layers: range, tensor: int = 1, vocabulary_multiple: int = 1) -> list[int]:
    """Elements of every parameter on one tensor rank of the stage that holds `layers`; `vocabulary` is V, MASK included."""
    hidden, head = config.hidden, config.head_size
    query, key_value = config.heads * head // tensor, 2 * config.kv_heads * head
    if config.kv_heads % tensor == 0:  # else each rank holds the weight of all key heads
        key_value //= tensor
    units = config.mlp_size // tensor
    up = units * (2 if config.mlp == "swiglu" else 1)
    norm = [hidden] * (2 if config.norm_bias else 1)
    size = config.conditioning_size if config.conditioning == "adaln" else 0
    layer = [query * hidden, key_value * hidden, query * hidden, up * hidden, units * hidden, *norm, *norm]
    layer += [query, key_value] if config.attention_bias != "none" else []
    layer += [hidden] if config.attention_bias == "all" else []
    layer += [up, hidden] if config.mlp_bias else []
    layer += [head, head] if config.query_key_norm else []
    layer += [6 * hidden * size, 6 * hidden] if size else []
    share = -(-vocabulary // (tensor * vocabulary_multiple)) * vocabulary_multiple
    first, last = layers.start == 0, layers.stop == config.layers
    sizes = layer * len(layers)
    sizes += [share * hidden] if first or (last and config.tied_head) else []
    sizes += [config.context * hidden] if first and config.positions == "learned" else []
    sizes += [SINUSOIDS * size, size, size * size, size] if size else []  # on every stage
    if last:
        sizes += norm + ([2 * hidden * size, 2 * hidden] if size else [])
        sizes += ([] if config.tied_head else [share * hidden]) + ([share] if config.head_bias else [])
    return sizes


def state_bytes(recipe: Recipe, stages: list[range], vocabulary: int, data: int, device: str, bf16: bool) -> StateBytes:
    """Of a rank that holds `stages` (one per virtual stage), among `data` data-parallel ranks; `device`: cpu | cuda."""
    parallel = recipe.parallel
    multiple = 128 if device == "cuda" else 1
    sizes = [size for layers in stages for size in stage_parameters(recipe.model, vocabulary, layers, parallel.tensor, multiple)]
    n, weight, zero, ema = sum(sizes), (2 if bf16 else 4), parallel.zero, 4 * bool(recipe.training.ema)
    divided = -(-n // data)
    if zero == 0:
        return StateBytes(4 * n, 4 * n, 0, 8 * n, ema * n, 0)
    if parallel.resolved_engine == "megatron":
        return StateBytes(weight * n, 4 * n, 4 * divided if bf16 else 0, 8 * divided, ema * divided, 0)
    if zero == 3:
        whole = sum(size for size in sizes if size <= PERSISTENT)
        buckets = weight * whole + 4 * min(n, LARGEST_BUCKET)
        return StateBytes(weight * divided, 4 * divided, 4 * divided, 8 * divided, ema * divided, buckets)
    gradients = (6 * n if bf16 else 4 * n) if zero == 1 else 4 * divided
    bucket = 4 * min(n, LARGEST_BUCKET) if zero == 1 and not bf16 else 0
    return StateBytes(weight * n, gradients, 4 * divided, 8 * divided, ema * divided, bucket)
