"""The time of each part of a training step at its limit, on one device: what bounds a step, term by term, before it is measured.

A product takes what its arithmetic takes at the device's best rate, and what it takes to read its operands and write its result once
(`Reached.product`, `Reached.memory`: that is why narrow layers reach less of the peak); attention its visited tiles at the rate of its
kernel, forward and backward; everything elementwise the bytes that it moves (`passes.py`); gradients and optimizer the bytes that the
engine moves per parameter (`update_bytes`, which has AdamW's for all), and Muon's products. The host starts kernels ahead of the device:
of its time only what is beyond the device's counts. Terms are added: on one stream nothing runs beside anything else, but for
communication, which `estimate.py` models.

Not counted: pulls of power on clocks, the allocator, data, validations, checkpoints; the noise of words (ssdlm) but for its products;
tiles that documents leave out; what engines' hooks take of the host beside their kernels.

Invariant: the FLOPs of the products here are those of `costs/flops.py`, and those of attention at least them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from bd3_scale.attention.mask import AttentionPattern, block_sparse_indices
from bd3_scale.costs.activation_memory import Batch
from bd3_scale.costs.orthogonal_step import orthogonal_flops
from bd3_scale.planning.cluster_plan import ClusterPlan
from bd3_scale.planning.devices import Device
from bd3_scale.planning.passes import Passes, attention_half, embedding_passes, final_norm, head_passes, mlp_half

TILE = 128
"""Rows of a tile of queries, and of keys, that attention kernels visit whole."""


@dataclass(frozen=True)
class Part:
    """Of one micro-batch, or of one step, on one device."""

    name: str
    forward: float
    """Seconds."""
    backward: float
    flops: float = 0.0
    """Of the arithmetic that runs, forward and backward."""
    bytes: float = 0.0
    """Moved by elementwise kernels."""

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    def times(self, count: int) -> Part:
        return Part(self.name, count * self.forward, count * self.backward, count * self.flops, count * self.bytes)

    def __add__(self, other: Part) -> Part:
        forward, backward = self.forward + other.forward, self.backward + other.backward
        return Part(self.name, forward, backward, self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class StageLimits:
    """Of one rank of a pipeline stage."""

    parts: tuple[Part, ...]
    """Of a micro-batch."""
    update: Part
    """Norm, clip, AdamW, EMA and new weights: once a step."""
    host: float
    """Seconds of a micro-batch in which the host starts kernels."""

    @property
    def device(self) -> float:
        """Seconds of a micro-batch that the device computes."""
        return sum(part.seconds for part in self.parts)

    @property
    def backward(self) -> float:
        return sum(part.backward for part in self.parts)

    @property
    def waited(self) -> float:
        """Seconds of a micro-batch in which the device waits for the host."""
        return max(0.0, self.host - self.device)


@dataclass(frozen=True)
class LayerLimits:
    """Of one micro-batch in one layer."""

    linears: Part
    attention: Part
    passes: Passes
    kernels: float


def layer_limits(cluster: ClusterPlan, batch: Batch, last: bool) -> LayerLimits:
    """`batch`: the expected micro-batch in a phase of the run (`ClusterPlan.batch`); `last`: of the network's last layer."""
    device, training = cluster.device, cluster.training
    peak, shares = device.peak(cluster.precision), attention_shares(cluster, batch)
    compiled = training.compile != "none"
    linears, passes, kernels = Part("linears", 0.0, 0.0), Passes(), 0.0
    attention = Part("attention", 0.0, 0.0)
    for half, found in (("attention", attention_half(batch, last, compiled)), ("mlp", mlp_half(batch, last, compiled))):
        again = int(training.recompute in (half, "layer"))
        products = list(half_products(batch, last, half))
        once = sum(product_seconds(device, cluster.precision, batch.weight, *one) for one in products)
        flops = sum(2.0 * rows * inputs * outputs for rows, inputs, outputs in products)
        linears += Part("linears", once, (2 + again) * once, (3 + again) * flops)
        passes += found + Passes(0, again * found.forward, 0, again * found.forward_kernels)
        kernels += (3 + again) * len(products)
        if half == "attention":
            flops = attention_flops(batch, last)
            forward, backward = flops / (shares[0] * peak), 2.5 * flops / (shares[1] * peak)
            attention = Part("attention", forward, backward + again * forward, (3.5 + again) * flops)
            kernels += 3 + again
    return LayerLimits(linears, attention, passes, kernels + passes.kernels)


def stage_limits(cluster: ClusterPlan, batch: Batch, pipeline_rank: int, layers: Sequence[LayerLimits]) -> StageLimits:
    """`layers`: of any layer but the network's last, and of that one (`layer_limits`)."""
    config, device, reached = cluster.model, cluster.device, cluster.device.reached
    held = cluster.stages_of(pipeline_rank)
    first, last = held[0].start == 0, held[-1].stop == config.layers
    count = sum(len(chunk) for chunk in held)
    middle, end = count - last, int(last)
    linears, attention = (getattr(layers[0], name).times(middle) + getattr(layers[1], name).times(end) for name in ("linears", "attention"))
    passes = layers[0].passes.times(middle) + layers[1].passes.times(end)
    kernels = middle * layers[0].kernels + end * layers[1].kernels
    parts = [linears, attention, _moved(device, "elementwise of the layers", passes)]
    if last:
        loss = head_passes(batch, cluster.vocabulary) + final_norm(batch, compiled=False)
        shape = (batch.selected, config.hidden, -(-cluster.vocabulary // batch.tensor))
        seconds = product_seconds(device, cluster.precision, batch.weight, *shape)
        parts.append(Part("head's products", 3 * seconds, 0.0, 6.0 * shape[0] * shape[1] * shape[2]))
        parts.append(_moved(device, "head's loss", loss))
        kernels += loss.kernels + 3
    if first:
        looked_up = embedding_passes(batch, cluster.vocabulary)
        parts.append(_moved(device, "embedding", looked_up))
        kernels += looked_up.kernels
        if flops := simplex_flops(cluster, batch):
            seconds = flops / (reached.product * device.peak(cluster.precision))
            parts.append(Part("expected embeddings", seconds, seconds, 2 * flops))
    accumulated, updated, started = update_bytes(cluster, pipeline_rank)
    update = _moved(device, "optimizer, clip, EMA", Passes(updated))
    if cluster.training.states.whole_matrices:
        flops = orthogonal_flops(cluster.model, cluster.parallel, held, cluster.sharers)
        update += Part(update.name, flops / (reached.product * device.peak(cluster.precision)), 0.0, flops)
    parts.append(_moved(device, "gradients added up", Passes(0, accumulated)))
    compiled = cluster.training.compile != "none"
    host = reached.launch * (kernels + started) + reached.layer[compiled] * count
    return StageLimits(tuple(parts), update, host)


def half_products(batch: Batch, last: bool, half: str) -> Iterator[tuple[int, int, int]]:
    """(rows, inputs, outputs) of each linear of half a layer on one tensor rank."""
    config, tensor = batch.config, batch.tensor
    every, handed = batch.computed(False), batch.computed(last)
    if half == "mlp":
        units = config.mlp_size // tensor
        yield handed, config.hidden, units * (2 if config.gated else 1)
        yield handed, units, config.hidden
        return
    query = config.heads * config.head_size // tensor
    yield handed, config.hidden, query
    yield every, config.hidden, 2 * max(1, config.kv_heads // tensor) * config.head_size
    yield handed, query, config.hidden


def product_seconds(device: Device, precision: str, weight: int, rows: float, inputs: float, outputs: float) -> float:
    """Of rows x inputs times inputs x outputs; `weight`: bytes of a number. The two products of its backward take as long each."""
    moved = weight * (rows * inputs + inputs * outputs + rows * outputs)
    arithmetic = 2.0 * rows * inputs * outputs / (device.reached.product * device.peak(precision))
    return arithmetic + moved / (device.reached.memory * device.bandwidth)


def attention_flops(batch: Batch, last: bool) -> float:
    """Of a forward on one tensor rank: q k^T and the sum over v of every tile that is visited."""
    pattern, config = batch.pattern, batch.config
    queries = pattern.scored_rows if last else pattern.rows
    pairs = queries * pattern.key_rows if batch.kernel == "dense" else TILE**2 * visited_tiles(pattern, queries)
    return 4.0 * batch.rows * pairs * config.heads * config.head_size / batch.tensor


@lru_cache(maxsize=256)
def visited_tiles(pattern: AttentionPattern, query_rows: int) -> int:
    """Tiles of `TILE` queries and keys in which something is visible."""
    found = block_sparse_indices(pattern, query_rows, TILE)
    return int(found["kv_num_blocks"].sum() + found["full_kv_num_blocks"].sum())


def attention_shares(cluster: ClusterPlan, batch: Batch) -> tuple[float, float]:
    """Of the peak, by the kernel of this micro-batch: forward, backward."""
    reached, wide = cluster.device.reached, batch.config.head_size > 64
    if batch.kernel != "flex":
        return reached.sdpa[wide]
    forward, backward = reached.flash[wide]
    return forward * reached.flex[0], backward * reached.flex[1]


def simplex_flops(cluster: ClusterPlan, batch: Batch) -> float:
    """Of a forward of expected embeddings (ssdlm) on one tensor rank; their backward is one more."""
    if not cluster.objective.traits.on_simplex:
        return 0.0
    return 2.0 * batch.config.hidden * (cluster.vocabulary - 1) * batch.pattern.scored_rows * batch.rows / batch.tensor


def update_bytes(cluster: ClusterPlan, pipeline_rank: int) -> tuple[float, float, int]:
    """(bytes of a micro-batch, bytes of a step, kernels of a micro-batch) on one rank of a stage: of a gradient one for
    each parameter, and for fsdp, three for each group that is reduced, and gathered. w: bytes of a weight that computes, d: data-parallel
    ranks that share what ZeRO divides. Of a parameter:

    | engine | each micro-batch | each step |
    |---|---|---|
    | megatron | w + 8 (into the fp32 buffer) | 4 zeros; 4 norm, 8 clip, 28 AdamW, 12 EMA, 4 + w new weights, all over d under ZeRO 1 |
    | deepspeed | w + 4 (to fp32), 12 (over d from ZeRO 2 on) | 4 zeros, 52 and 4 + w over d; ZeRO 1: 20 more (flat copies) |
    | fsdp | w + 4, 20 / d; ZeRO 3: 4 w + 2 (4 + w) / d to gather twice | 52 / d; ZeRO 2: 2 w + (4 + w) / d to gather |

    DeepSpeed's row was counted on a stub of the CUDA driver: 18 and 82 bytes for one rank under ZeRO 1 in bf16.
    """
    recipe, parallel = cluster.recipe, cluster.parallel
    chunks = cluster.units_of(pipeline_rank)
    sizes, groups = [size for chunk in chunks for size in chunk.sizes], sum(len(chunk.groups) for chunk in chunks)
    n, tensors, w = float(sum(sizes)), len(sizes), 2 if cluster.precision == "bf16" else 4
    d = cluster.sharers if parallel.zero else 1
    cast = w + 4 if w < 4 else 0
    each = 4 + 8 + 28 + (12 if recipe.training.ema else 0)
    engine = parallel.resolved_engine
    if engine == "megatron":
        return n * (w + 8), n * (4 + (each + cast) / d), tensors
    if engine == "deepspeed":
        partly = d if parallel.zero >= 2 else 1
        return n * (cast + 12 / partly), n * (4 / partly + (20 if parallel.zero == 1 else 0) + (each + cast) / d), tensors
    gather = 2 * w + cast / d
    if parallel.zero == 3:
        return n * (cast + 20 / d + 2 * gather), n * each / d, tensors + 9 * groups
    return n * (cast + 20 / d), n * (each / d + gather), tensors + 3 * groups


def _moved(device: Device, name: str, passes: Passes) -> Part:
    speed = device.reached.memory * device.bandwidth
    return Part(name, passes.forward / speed, passes.backward / speed, 0.0, passes.bytes)
