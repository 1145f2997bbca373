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
| FSDP 2 | w p over a step's micro-batches | 4p/s | 4p/s | 8p/s | 4p/s |
| FSDP 3 | layer by layer | 4p/s | 4p/s | 8p/s | 4p/s |

(p: the elements with every parameter's rows padded to a multiple of s, the ranks that share a copy, `parallel.shard` or d.)

DeepSpeed 3, and 1 in fp32, keep a reduce bucket while gradients are accumulated; the others have one for the time of a
backward, not counted here.
(Moments are written for AdamW, 8 bytes; another optimizer keeps 4 bytes for each of its states, `recipe/optimizers.py`.)
Activations and what PyTorch allocates for a moment are not counted. Invariant: a test measures every layout against this.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from bd3_scale.costs.parameter_shapes import Units, elements, shard, units_of
from bd3_scale.costs.sizes import LARGEST_BUCKET, PERSISTENT, VOCABULARY_MULTIPLE
from bd3_scale.recipe.optimizers import States
from bd3_scale.recipe.schema import ModelConfig, ParallelConfig, TrainingConfig


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


def state_bytes(
    model: ModelConfig,
    training: TrainingConfig,
    parallel: ParallelConfig,
    stages: list[range],
    vocabulary: int,
    data: int,
    device: str,
    bf16: bool,
) -> StateBytes:
    """Of a rank that holds `stages` (one per virtual stage), among `data` ranks of data and context; `device`: cpu | cuda."""
    chunks = [units_of(model, vocabulary, layers, parallel.tensor, VOCABULARY_MULTIPLE[device]) for layers in stages]
    sizes = [size for chunk in chunks for size in chunk.sizes]
    if parallel.resolved_engine == "fsdp":
        copy = parallel.shard * parallel.context if parallel.shard else data
        return _sharded_bytes(training, parallel, chunks, copy, 2 if bf16 else 4)
    n, weight, zero, ema = sum(sizes), (2 if bf16 else 4), parallel.zero, 4 * bool(training.ema)
    hidden = sum(elements(chunk.hidden) for chunk in chunks)
    shared = 1 if zero == 0 else data
    divided = -(-n // shared)
    moments = moment_bytes(training.states, -(-hidden // shared), divided)
    if zero == 0:
        return StateBytes(4 * n, 4 * n, 0, moments, ema * n, 0)
    if parallel.resolved_engine == "megatron":
        return StateBytes(weight * n, 4 * n, 4 * divided if bf16 else 0, moments, ema * divided, 0)
    if zero == 3:
        whole = sum(size for size in sizes if size <= PERSISTENT)
        buckets = weight * whole + 4 * min(n, LARGEST_BUCKET)
        return StateBytes(weight * divided, 4 * divided, 4 * divided, moments, ema * divided, buckets)
    gradients = (6 * n if bf16 else 4 * n) if zero == 1 else 4 * divided
    bucket = 4 * min(n, LARGEST_BUCKET) if zero == 1 and not bf16 else 0
    return StateBytes(weight * n, gradients, 4 * divided, moments, ema * divided, bucket)


def moment_bytes(states: States, hidden: int, held: int) -> int:
    """What the optimizer keeps of `held` elements, `hidden` of them of hidden matrices."""
    return 4 * (len(states.hidden) * hidden + len(states.other) * (held - hidden))


def checkpoint_bytes(model: ModelConfig, training: TrainingConfig, vocabulary: int) -> int:
    """Of a checkpoint's tensors: fp32 weights, the optimizer's states, and the average."""
    units = units_of(model, vocabulary, range(model.layers))
    n = sum(units.sizes)
    return (8 if training.ema else 4) * n + moment_bytes(training.states, elements(units.hidden), n)


def _sharded_bytes(training: TrainingConfig, parallel: ParallelConfig, chunks: list[Units], sharers: int, weight: int) -> StateBytes:
    """Of the first of the ranks that share a copy: the last ones have fewer rows."""
    own = sum(shard(group, sharers) for chunk in chunks for group in chunk.groups)
    hidden = sum(shard(chunk.hidden, sharers) for chunk in chunks)
    gathered = weight * sharers * own if parallel.zero == 2 else 0
    return StateBytes(gathered, 4 * own, 4 * own, moment_bytes(training.states, hidden, own), 4 * bool(training.ema) * own, 0)
