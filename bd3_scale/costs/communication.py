"""Bytes that one rank moves per optimizer step, by group and collective, from the recipe alone.

`Transfer.bytes` is the payload: the size of the whole tensor of each collective, summed over the calls of a step; `Transfer.sent` is
what a ring sends from one rank: 2 (k - 1) / k of it for an all-reduce among k ranks, (k - 1) / k for a gather or a reduce-scatter,
all of it from stage to stage, and of what an optimizer gathers of matrices (`orthogonal_step.py`). Below, n: elements of the
parameters on the rank, M: micro-batches, w: bytes of a weight that computes.

Data (gradients are summed in fp32):

| engine, ZeRO | gradients | weights |
|---|---|---|
| DeepSpeed 0 | all-reduce 4n | |
| DeepSpeed 1 | all-reduce 4n | gather w n |
| DeepSpeed 2 | all-reduce 4n for each of M | gather w n |
| DeepSpeed 3 | reduce-scatter 4n for each of M | gather w n' for each of M, w (n - n') once |
| megatron-core 0 | all-reduce 4n | |
| megatron-core 1 | reduce-scatter 4n | gather w n |
| FSDP 2 | reduce-scatter 4p for each of M, all-reduce 4p/s among copies | gather w p |
| FSDP 3 | reduce-scatter 4p for each of M, all-reduce 4p/s among copies | gather w p and w p' for each of M |

(p: n with every parameter's rows padded to a multiple of s, the ranks that share a copy; p': what is gathered again for the backward:
not the head, which is done with its weight, nor an embedding that is only looked up in, nor, with one stage, what the root holds.)
(n': what DeepSpeed 3 divides, and once more for the backward what it let go after the forward: nothing below half of `REUSE`, above
it known to some per cent only, since what it prefetches stays, too.)

Tensor, per micro-batch, X = w x rows x hidden (in the last layer of the scored rows, but for keys and values): a row-parallel linear
sums its output in the forward (embedding, attention output, MLP down), a column-parallel one its input's gradient in the backward
(query, key/value, MLP up). Under sequence parallelism each such sum is a reduce-scatter of X and has a gather of X as its other pass;
column-parallel linears gather their input once more for the gradient of the weight; and the rows that the last layer computes are divided
anew by such a sum. Norms over all heads sum four bytes of each row, forwards and backwards, for queries and for keys. Context, per
micro-batch and layer: what travels of keys and values of all context ranks (of block diffusion the clean half, b L rows of the rank's kv
heads) is gathered in the forward, and once more where the attention is recomputed, and its gradient is reduce-scattered; in a ring a
rank's share of it makes C - 1 steps in every forward and in the backward, its gradient too. The data-parallel ranks above are then those
of data and context together. The head sums the gradient of the selected positions, the cross-entropy three numbers of each (the score
entropy one). Gradients of parameters that tensor ranks hold whole but know in part are summed for each micro-batch (DeepSpeed) or once,
FSDP's as shards. Recomputation makes the forward collectives of its part of a layer again, up to the last tensor that is needed. Expected
embeddings (ssdlm) sum one number of each noisy position. Pipeline: hidden states forwards, their gradients backwards; conditions and tied
embeddings are summed once (FSDP's as shards).

Left out are numbers of a few bytes (norms, losses, the tuner's choice) and what only checkpoints and validations move.
Invariant: a test counts the collectives of the real engines, call by call, and finds exactly these bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bd3_scale.costs.activation_memory import Batch
from bd3_scale.costs.orthogonal_step import exchanged_bytes
from bd3_scale.costs.parameter_shapes import Shape, Units, parameter_shapes, shard, units_of, whole
from bd3_scale.costs.sizes import PERSISTENT, VOCABULARY_MULTIPLE, padded_vocabulary
from bd3_scale.recipe.schema import ParallelConfig, TrainingConfig

REUSE = 1_000_000_000
"""Elements: DeepSpeed 3 keeps a gathered parameter that it needs again within as many (stage3_max_reuse_distance)."""


@dataclass(frozen=True)
class Transfer:
    """All calls of one collective in one group in a step."""

    group: str
    """data (those that share a copy) | copies | tensor | context | pipeline | embedding (the first and the last stage) | matrices (those of
    a stage that together hold its hidden matrices once)."""
    operation: str
    """all_reduce | all_gather | reduce_scatter | all_to_all | send."""
    ranks: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that leave this rank where the collective runs as a ring."""
        if self.operation in ("send", "all_to_all"):
            return float(self.bytes)
        return (2 if self.operation == "all_reduce" else 1) * (self.ranks - 1) / self.ranks * self.bytes


def step_traffic(
    training: TrainingConfig,
    parallel: ParallelConfig,
    stages: Sequence[range],
    vocabulary: int,
    batch: Batch,
    data: int,
    micro_batches: int,
    pipeline_rank: int,
) -> list[Transfer]:
    """Of a rank that holds `stages` (one per virtual stage); `data`: replicas. Groups of one rank move nothing."""
    model, multiple = batch.config, VOCABULARY_MULTIPLE[batch.device]
    chunks = [units_of(model, vocabulary, layers, parallel.tensor, multiple) for layers in stages]
    fsdp, simplex = parallel.resolved_engine == "fsdp", batch.kind.on_simplex
    states, copy = data * parallel.context, (parallel.shard or data) * parallel.context
    sharers = copy if fsdp else 1
    """Among whom what is summed at the end of a step has been divided."""
    found: Counter[tuple[str, str]] = Counter()
    if fsdp:
        one_stage = parallel.pipeline == 1
        for chunk in chunks:
            _add(found, "data", sharded_bytes(chunk, parallel.zero, sharers, batch.weight, micro_batches, one_stage, not simplex))
        _add(found, "copies", {"all_reduce": sum(4 * shard(group, sharers) for chunk in chunks for group in chunk.groups)})
    else:
        sizes = [size for chunk in chunks for size in chunk.sizes]
        _add(found, "data", data_bytes(sizes, parallel.zero, parallel.resolved_engine, batch.weight, micro_batches))
    for layers in stages:
        one = tensor_bytes(batch, layers, training.recompute)
        _add(found, "tensor", {operation: micro_batches * number for operation, number in one.items()})
        if simplex and layers.start == 0:  # the mass of each rank's words
            _add(found, "tensor", {"all_reduce": micro_batches * 4 * batch.pattern.scored_rows * batch.rows})
        brought = context_bytes(batch, layers, training.recompute)
        _add(found, "context", {operation: micro_batches * number for operation, number in brought.items()})
        times, width = (micro_batches, batch.weight) if parallel.resolved_engine == "deepspeed" else (1, 4)
        _add(found, "tensor", {"all_reduce": times * width * shard(partial_shapes(batch, layers), sharers)})
    zero_ranks = (sharers if fsdp else states) if parallel.zero else 1
    if training.states.whole_matrices:
        _add(found, "matrices", {"all_to_all": exchanged_bytes(model, parallel, stages, vocabulary, zero_ranks, batch.weight)})
    if parallel.pipeline > 1:
        _add(found, "pipeline", pipeline_bytes(batch, len(stages), parallel.pipeline, pipeline_rank, micro_batches, sharers))
        if model.tied_head and pipeline_rank in (0, parallel.pipeline - 1):
            share = padded_vocabulary(vocabulary, parallel.tensor, multiple) // parallel.tensor
            _add(found, "embedding", {"all_reduce": 4 * shard([(share, model.hidden)], sharers)})
    ranks = {"data": sharers if fsdp else states, "copies": states // sharers if fsdp else 1, "tensor": parallel.tensor}
    ranks |= {"context": parallel.context, "pipeline": parallel.pipeline, "embedding": 2, "matrices": parallel.tensor * zero_ranks}
    return [Transfer(group, operation, ranks[group], number) for (group, operation), number in found.items() if number and ranks[group] > 1]


def _add(found: Counter[tuple[str, str]], group: str, moved: dict[str, int]) -> None:
    for operation, number in moved.items():
        found[group, operation] += number


def data_bytes(sizes: Sequence[int], zero: int, engine: str, weight: int, micro_batches: int) -> dict[str, int]:
    """Payload per step over the data-parallel ranks; `sizes`: elements of each parameter on the rank."""
    n = sum(sizes)
    if zero == 0:
        return {"all_reduce": 4 * n}
    if engine == "megatron":
        return {"reduce_scatter": 4 * n, "all_gather": weight * n}
    if zero < 3:
        return {"all_reduce": (micro_batches if zero == 2 else 1) * 4 * n, "all_gather": weight * n}
    divided = [size for size in sizes if size > PERSISTENT]
    gathered = sum(divided) + _gathered_again(divided)
    persistent = n - sum(divided)
    return {"reduce_scatter": micro_batches * 4 * n, "all_gather": weight * (micro_batches * gathered + persistent)}


def sharded_bytes(
    chunk: Units, zero: int, sharers: int, weight: int, micro_batches: int, one_stage: bool, looked_up: bool
) -> dict[str, int]:
    """Payload per step among the ranks that share a copy of a chunk under FSDP; `looked_up`: its embedding multiplies nothing."""
    once = sum(whole(group, sharers) for group in chunk.groups)
    if zero == 2:
        gathered = once
    else:
        again = chunk.layers * whole(chunk.layer, sharers)
        again += 0 if looked_up else whole(chunk.embedding, sharers)
        again += 0 if one_stage else whole(chunk.rest, sharers)
        gathered = micro_batches * (once + again)
    return {"reduce_scatter": micro_batches * 4 * once, "all_gather": weight * gathered}


def _gathered_again(divided: Sequence[int]) -> int:
    """Elements that DeepSpeed 3 lets go after their forward and gathers for their backward: between the two lie all parameters
    behind them, twice."""
    again, behind = 0, 0
    for size in reversed(divided):
        again += size if 2 * behind > REUSE else 0
        behind += size
    return again


def conditions_of(batch: Batch) -> int:
    """Vectors that adaLN conditions a micro-batch with: one for all; of noise, one for each row of one block (sedd), or for each of a
    row's blocks and its clean half (ssdlm)."""
    if not batch.kind.noise_conditioned:
        return 1
    return batch.rows * (1 if batch.kind.denoises_whole_rows else batch.pattern.scored_rows // batch.pattern.block_size + 1)


def tensor_bytes(batch: Batch, layers: range, recompute: str) -> dict[str, int]:
    """Payload over the tensor ranks of one forward and backward of a chunk, without the gradients of parameters."""
    config, w = batch.config, batch.weight
    whole = w * batch.computed(False) * config.hidden
    scored = w * batch.computed(True) * config.hidden
    taken = scored if batch.sequence and batch.sparse else 0
    first, last = layers.start == 0, layers.stop == config.layers
    shared = config.kv_heads % batch.tensor != 0
    # Something behind the MLP keeps a tensor of it.
    after = config.dropout > 0 or config.conditioning == "adaln" or config.norm_place != "before"
    over_heads = config.query_key_norm and config.query_key_norm_width == "heads"
    passes = (3 if recompute in ("attention", "layer") else 2) if over_heads else 0
    sums = gathers = squares = 0
    for index in layers:
        rows = scored if index + 1 == config.layers else whole
        inputs, outputs = 2 * rows + whole, 2 * rows  # query, MLP up, key/value; attention output, MLP down
        # A part is computed again up to the last tensor that is needed: of its last sum only where something behind it keeps one.
        again = rows * ((recompute == "layer") + (recompute != "none" and after))
        gathered_again = {"none": 0, "attention": rows + whole, "mlp": rows, "layer": inputs}[recompute]
        if index + 1 == config.layers:
            again += taken if recompute in ("attention", "layer") else 0
            sums += taken
            gathers += taken
        squares += passes * 4 * (batch.computed(index + 1 == config.layers) + batch.computed(False))
        sums += inputs + outputs + again
        gathers += inputs + outputs + (inputs - (whole if shared else 0)) + gathered_again
    sums += whole if first else 0
    gathers += (whole if first else 0) + (scored if last else 0)
    # The head is the same with sequence parallelism and without: its input is gathered before.
    head = batch.selected * (w * config.hidden + 4 * (3 if batch.kind.uses_cross_entropy else 1)) if last else 0
    if not batch.sequence:
        return {"all_reduce": sums + squares + head}
    condition = w * config.conditioning_size * conditions_of(batch) if config.conditioning == "adaln" else 0
    return {"reduce_scatter": sums, "all_gather": gathers, "all_reduce": squares + head + condition}


def context_bytes(batch: Batch, layers: range, recompute: str) -> dict[str, int]:
    """Payload over the context ranks of one forward and backward of a chunk."""
    config, pattern = batch.config, batch.pattern
    key_heads = max(1, config.kv_heads // batch.tensor)
    rows = (pattern.key_rows - pattern.own_keys) * batch.rows
    payload = len(layers) * batch.weight * rows * key_heads * 2 * config.head_size
    forwards = 2 if recompute in ("attention", "layer") else 1
    if pattern.ring:  # each step is an exchange of all with all, in which only neighbours have anything to say
        return {"all_to_all": (forwards + 2) * (pattern.context_ranks - 1) * payload // pattern.context_ranks}
    return {"all_gather": forwards * payload, "reduce_scatter": payload}


def partial_shapes(batch: Batch, layers: range) -> list[Shape]:
    """Of the parameters whose gradient each tensor rank knows in part; none of them has a row for each id."""
    found = parameter_shapes(batch.config, 0, layers, batch.tensor, batch.sequence)
    return [parameter.held(batch.tensor) for parameter in found.values() if parameter.partial]


def pipeline_bytes(batch: Batch, virtual: int, pipeline: int, pipeline_rank: int, micro_batches: int, sharers: int = 1) -> dict[str, int]:
    """Payload from this rank to its neighbours, and in the sum of what all stages hold, of which each rank has its share."""
    config = batch.config
    state = batch.hidden_states
    forwards, backwards = virtual - (pipeline_rank == pipeline - 1), virtual - (pipeline_rank == 0)
    condition = [one.held(1) for name, one in parameter_shapes(config, 0, range(0)).items() if name.startswith("condition.")]
    return {"send": micro_batches * (forwards + backwards) * state, "all_reduce": 4 * shard(condition, sharers)}
