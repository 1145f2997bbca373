"""Memory and time of a situation: what each stage holds and computes, what moves, what of it is waited for, days and price.

Memory is counted (`costs/state_memory.py`, `costs/activation_memory.py`); time is a model, of which these are the assumptions: every part
of a micro-batch and of the optimizer's step runs at its limit (`limits.py`), or, where `mfu` is given, a device reaches this share of its
peak while it computes (of model FLOPs; recomputed ones cost as much) and the optimizer costs nothing; the slowest stage sets the pace;
the bubble is that of the schedule; a link reaches `EFFICIENCY` of its bandwidth; tensor and sequence parallelism
wait for their collectives but for those that megatron-core's linears run behind products of their backward (`hidden_exchange`);
stages wait for theirs unless the schedule interleaves; gradients hide behind the backward where the engine overlaps them, and what is
gathered of weights behind what computes with those before, but for one bucket of each. Data, validations and checkpoints are not
counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.costs import pipeline_stages
from bd3_scale.costs.activation_memory import exchange_bytes, kept_bytes, logits_bytes, most_bytes, working_bytes
from bd3_scale.costs.communication import Transfer, step_traffic
from bd3_scale.costs.flops import RowFlops, count_flops
from bd3_scale.costs.parameter_shapes import whole
from bd3_scale.costs.pipeline_stages import Phase
from bd3_scale.costs.sizes import LARGEST_BUCKET, bucket_elements
from bd3_scale.costs.state_memory import state_bytes
from bd3_scale.planning.cluster_plan import ClusterPlan
from bd3_scale.planning.devices import EFFICIENCY
from bd3_scale.planning.limits import StageLimits, layer_limits, product_seconds, stage_limits

LIVE = 1_000_000_000
"""Elements of gathered weights that DeepSpeed 3 lets live at a time (stage3_max_live_parameters)."""
FALLBACK_BUCKET = 500_000_000
"""Elements that DeepSpeed 0, and its BF16_Optimizer, reduce at a time."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of a stage at the fullest moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 masters and Adam's moments."""
    ema: int
    activations: int
    logits: int
    buffers: int
    """Of communication, and what a backward needs for a moment."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def state(self) -> int:
        """What stays between two steps."""
        return self.weights + self.gradients + self.optimizer + self.ema


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    """Of the slowest stage, all micro-batches."""
    host: float
    """In which the device waits for the host to start kernels."""
    update: float
    """Of the optimizer, with clip and EMA."""
    bubble: float
    tensor: float
    data: float
    """What of the data-parallel communication is not hidden, and what an optimizer gathers of matrices."""
    pipeline: float
    context: float = 0.0
    """In which keys and values are gathered, and their gradients scattered back."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(cluster: ClusterPlan, pipeline_rank: int) -> RankMemory:
    """Of the ranks of a stage, in the phase of the run that needs the most: tensor and data-parallel peers hold as much."""
    distinct = {(phase.pattern, phase.rows): phase for phase in cluster.phases}
    return max((_phase_memory(cluster, phase, pipeline_rank) for phase in distinct.values()), key=lambda memory: memory.total)


def _phase_memory(cluster: ClusterPlan, phase: Phase, pipeline_rank: int) -> RankMemory:
    training, parallel, batch = cluster.training, cluster.parallel, cluster.batch(phase)
    held = cluster.stages_of(pipeline_rank)
    bf16 = cluster.precision == "bf16"
    state = state_bytes(cluster.model, training, parallel, held, cluster.vocabulary, cluster.states, cluster.device.type, bf16)
    recompute, pipelined, interleaved = training.recompute, parallel.pipeline > 1, parallel.virtual_stages > 1
    kept = [
        kept_bytes(batch, layers, cluster.vocabulary, recompute=recompute, pipeline=pipelined, interleaved=interleaved) for layers in held
    ]
    last = held[-1].stop == cluster.model.layers
    buffers = exchange_bytes(batch, parallel, pipeline_rank) + working_bytes(batch, recompute=recompute) + state.buckets
    return RankMemory(
        weights=state.parameters,
        gradients=state.gradients,
        optimizer=state.masters + state.moments,
        ema=state.ema,
        activations=most_bytes(kept, parallel, pipeline_rank, cluster.shares(phase).micro_batches).total,
        logits=logits_bytes(batch, cluster.vocabulary) if last else 0,
        buffers=buffers + _reduction_bytes(cluster, pipeline_rank),
    )


def _reduction_bytes(cluster: ClusterPlan, pipeline_rank: int) -> int:
    """What DeepSpeed and FSDP allocate for a moment to reduce gradients (fp32 on the way) and to gather weights."""
    parallel, batch = cluster.parallel, cluster.batch()
    if parallel.resolved_engine == "fsdp":
        return _gathered_bytes(cluster, pipeline_rank)
    if cluster.states == 1 or parallel.resolved_engine != "deepspeed":  # megatron-core reduces in its gradient buffers
        return 0
    n = _elements(cluster, pipeline_rank)
    if parallel.zero == 3:
        return batch.weight * min(n, LIVE)
    if parallel.zero == 2:
        buckets = 2 if cluster.device.type == "cuda" else 1  # one is filled while the other is reduced
        return min(n, LARGEST_BUCKET) * (buckets * batch.weight + (4 if batch.weight < 4 else 0))
    return 4 * min(n, FALLBACK_BUCKET)


def _elements(cluster: ClusterPlan, pipeline_rank: int) -> int:
    """Of the parameters on one tensor rank of a stage."""
    return sum(sum(chunk.sizes) for chunk in cluster.units_of(pipeline_rank))


def _gathered_bytes(cluster: ClusterPlan, pipeline_rank: int) -> int:
    """FSDP's, of the chunk that needs the most: the weights of two groups, one that computes and one on its way (and, in ZeRO 3, what the
    root holds), the gradients of one as they arise and, in fp32, as they are sent."""
    parallel, weight = cluster.parallel, cluster.batch().weight
    most = 0
    for chunk in cluster.units_of(pipeline_rank):
        sizes = sorted((whole(group, cluster.sharers) for group in chunk.groups), reverse=True)
        gathered = sum(sizes[:2]) + whole(chunk.rest, cluster.sharers) if parallel.zero == 3 else sizes[0]
        most = max(most, weight * gathered + (weight + 4) * sizes[0])
    return most


# -- Time --------------------------------------------------------------------------------------------------------------


def row_flops(cluster: ClusterPlan, phase: Phase) -> RowFlops:
    """FLOPs of one row of the whole network."""
    share, simplex = pipeline_stages.selected_share(cluster.objective, phase.pattern), cluster.objective.traits.on_simplex
    return count_flops(cluster.model, phase.pattern, cluster.vocabulary, share, simplex)


def autoregressive_flops(cluster: ClusterPlan) -> float:
    """Model FLOPs of one row of the same network in a next-token run: what a run of block diffusion is compared with."""
    length = cluster.model.context
    return count_flops(cluster.model, AttentionPattern("causal", length, 1), cluster.vocabulary, 1.0).model


def layer_passes(cluster: ClusterPlan, phase: Phase) -> float:
    """Forwards of the layers that one forward and backward cost: 3, and the share of one that is computed again."""
    row = row_flops(cluster, phase)
    return 3 + row.recomputed(cluster.training.recompute) / row.layers


def stage_flops(cluster: ClusterPlan, phase: Phase, pipeline_rank: int) -> float:
    """FLOPs that one tensor and context rank of a stage computes for one micro-batch, forward and backward, with recomputation."""
    parallel = cluster.parallel
    share = pipeline_stages.selected_share(cluster.objective, phase.pattern)
    simplex = cluster.objective.traits.on_simplex
    rows = cluster.shares(phase).micro_batch
    layers, _, head = pipeline_stages.layer_costs(cluster.model, phase.pattern, cluster.vocabulary, share, rows, simplex)
    passes = layer_passes(cluster, phase)
    held = cluster.stages_of(pipeline_rank)
    own = passes * sum(layers[index] for chunk in held for index in chunk)
    own += 3 * head if held[-1].stop == cluster.model.layers else 0
    own += 2 * row_flops(cluster, phase).embedding * rows if held[0].start == 0 else 0
    return own / (parallel.tensor * parallel.context)


@dataclass(frozen=True)
class Pace:
    """What the slowest stage needs, in seconds."""

    rank: int
    once: float
    """Of a micro-batch, forward and backward, on the device."""
    backward: float
    """Of it, behind the forward."""
    waited: float
    """Of a micro-batch, for the host."""
    update: float
    """Once a step."""
    product: Callable[[float, float, float], float]
    """Of rows x inputs times inputs x outputs."""
    limits: StageLimits | None = None
    """What it is made of; None where a share of the peak was assumed."""


def pace(cluster: ClusterPlan, phase: Phase, mfu: float | None = None) -> Pace:
    """`mfu`: the share of its peak that a device is taken to reach while it computes; None: every part at its limit."""
    ranks = range(cluster.parallel.pipeline)
    if mfu is not None:
        speed = mfu * cluster.device.peak(cluster.precision)
        cost, rank = max((stage_flops(cluster, phase, rank), -rank) for rank in ranks)
        once = cost / speed
        backward = once * (1 - 1 / layer_passes(cluster, phase))
        return Pace(-rank, once, backward, 0.0, 0.0, lambda rows, inputs, outputs: 2.0 * rows * inputs * outputs / speed)
    batch = cluster.batch(phase)
    layers = [layer_limits(cluster, batch, last) for last in (False, True)]
    found = [stage_limits(cluster, batch, rank, layers) for rank in ranks]
    rank = max(ranks, key=lambda rank: found[rank].device + found[rank].waited)

    def product(rows: float, inputs: float, outputs: float) -> float:
        return product_seconds(cluster.device, cluster.precision, batch.weight, rows, inputs, outputs)

    one = found[rank]
    return Pace(rank, one.device, one.backward, one.waited, max(each.update.seconds for each in found), product, one)


def bubble_fraction(cluster: ClusterPlan) -> float:
    """Of a step's time in the longest phase, where all stages cost the same: (P - 1) / (v M + P - 1)."""
    pipeline, virtual = cluster.parallel.pipeline, cluster.parallel.virtual_stages
    return (pipeline - 1) / (virtual * cluster.shares().micro_batches + pipeline - 1)


def traffic_of(cluster: ClusterPlan, phase: Phase, pipeline_rank: int) -> list[Transfer]:
    batch, micro_batches = cluster.batch(phase), cluster.shares(phase).micro_batches
    return step_traffic(
        cluster.training,
        cluster.parallel,
        cluster.stages_of(pipeline_rank),
        cluster.vocabulary,
        batch,
        cluster.replicas,
        micro_batches,
        pipeline_rank,
    )


def bandwidth(cluster: ClusterPlan, group: str) -> float:
    """Bytes/s of one device in a group: across nodes as soon as the group, or its neighbours, lie on more than one."""
    parallel, device = cluster.parallel, cluster.device
    span = {
        "tensor": parallel.tensor,
        "data": parallel.tensor * cluster.sharers,
        "matrices": parallel.tensor * (cluster.sharers if parallel.zero else 1),
        "copies": parallel.tensor * cluster.states,
        "context": parallel.tensor * parallel.context,
    }.get(group, cluster.world_size)
    return EFFICIENCY * (device.inside if span <= device.per_node else device.outside)


def step_time(cluster: ClusterPlan, phase: Phase, mfu: float | None = None) -> StepTime:
    """`mfu` as in `pace`."""
    return step_at(cluster, phase, pace(cluster, phase, mfu))


def step_at(cluster: ClusterPlan, phase: Phase, slowest: Pace) -> StepTime:
    """The time of a step at this pace of the slowest stage."""
    parallel, rank, once = cluster.parallel, slowest.rank, slowest.once
    moved, micro_batches = traffic_of(cluster, phase, rank), cluster.shares(phase).micro_batches

    def seconds(group: str, *operations: str) -> float:
        chosen = [one for one in moved if one.group == group and (not operations or one.operation in operations)]
        return sum(one.sent for one in chosen) / bandwidth(cluster, group)

    gradients = seconds("data", "all_reduce", "reduce_scatter") + seconds("copies")
    waited = _waited_for(cluster, micro_batches, rank, gradients, seconds("data", "all_gather"), once, slowest.backward)
    exchanged = seconds("pipeline") if parallel.virtual_stages == 1 else 0.0
    return StepTime(
        compute=once * micro_batches,
        host=slowest.waited * micro_batches,
        update=slowest.update,
        bubble=(once + slowest.waited) * (parallel.pipeline - 1) / parallel.virtual_stages,
        tensor=seconds("tensor") - micro_batches * hidden_exchange(cluster, phase, rank, slowest.product),
        data=waited + seconds("embedding") + seconds("matrices"),
        pipeline=exchanged,
        context=seconds("context"),
    )


def hidden_exchange(cluster: ClusterPlan, phase: Phase, pipeline_rank: int, product: Callable[[float, float, float], float]) -> float:
    """Seconds of a micro-batch's collectives among the tensor ranks that run behind a product on CUDA.

    In the backward of a column-parallel linear megatron-core sums the input's gradient while the weight's is computed; under sequence
    parallelism it gathers the input once more while the input's gradient is computed. Each hides as long as its product takes.
    """
    model, parallel, batch = cluster.model, cluster.parallel, cluster.batch(phase)
    tensor = parallel.tensor
    if tensor == 1 or cluster.device.type != "cuda":
        return 0.0
    key_value = 2 * model.kv_heads * model.head_size
    shared = bool(model.kv_heads % tensor)  # such a projection gathers by itself, and waits
    hidden, held = 0.0, [index + 1 == model.layers for layers in cluster.stages_of(pipeline_rank) for index in layers]
    for last in set(held):
        asking = batch.computed(last)
        linears = [(asking, model.heads * model.head_size), (asking, model.mlp_size * (2 if model.gated else 1))]
        linears += [] if shared else [(batch.computed(False), key_value)]
        for rows, outputs in linears:
            taken = product(rows, model.hidden, outputs / tensor)
            moved = batch.weight * rows * model.hidden * (tensor - 1) / tensor / bandwidth(cluster, "tensor")
            # Reduce-scatter and gather of as many bytes; or an all-reduce, which takes as long as both, behind one product.
            hidden += held.count(last) * (2 * min(moved, taken) if parallel.sequence else min(2 * moved, taken))
    return hidden


def _waited_for(cluster: ClusterPlan, count: int, rank: int, gradients: float, weights: float, once: float, backward: float) -> float:
    """Seconds of the data-parallel communication that nothing hides. `count`: micro-batches; `once`, `backward`: what each computes, and
    behind its forward."""
    parallel = cluster.parallel
    if cluster.device.type == "cuda" and parallel.resolved_engine == "fsdp":
        # Gradients hide behind all backwards; weights behind what computes with the ones before, and beside the gradients.
        behind = count * once if parallel.zero == 3 else count * backward + (once - backward)
        return max(0.0, gradients - count * backward, gradients + weights - behind)
    if parallel.resolved_engine == "megatron":
        # The last bucket of gradients is there when the backward ends, and the first of weights is needed when a forward begins.
        n = _elements(cluster, rank)
        one_bucket = min(1.0, bucket_elements(n, cluster.states) / n)
        return max(gradients - backward, one_bucket * gradients) + max(weights - (once - backward), one_bucket * weights)
    hidden = 0.0
    if parallel.pipeline == 1 and parallel.zero >= 2 and cluster.device.type == "cuda":
        hidden = count * backward
        weights = max(0.0, weights - count * once) if parallel.zero == 3 else weights
    elif parallel.pipeline > 1 or (parallel.zero == 1 and cluster.precision == "fp32" and cluster.device.type == "cuda"):
        hidden = backward  # of the last micro-batch
    return max(0.0, gradients - hidden) + weights
