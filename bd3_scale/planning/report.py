"""A plan as one value, and as text for people. See `estimate.py` for what is counted and what is assumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bd3_scale.costs.flops import ParameterCount, count_parameters
from bd3_scale.costs.pipeline_stages import Phase
from bd3_scale.costs.state_memory import checkpoint_bytes
from bd3_scale.data.preparation.packing import texts_end_at
from bd3_scale.planning.cluster_plan import ClusterPlan
from bd3_scale.planning.estimate import (
    Pace,
    RankMemory,
    StepTime,
    autoregressive_flops,
    bandwidth,
    bubble_fraction,
    pace,
    rank_memory,
    row_flops,
    step_at,
    traffic_of,
)
from bd3_scale.planning.limits import Part, attention_shares

CURE = "raise parallel.zero, tensor or pipeline, lower parallel.micro_batch, or set training.recompute=layer; --search lists what fits"


@dataclass(frozen=True)
class Moved:
    """Bytes of a step on the rank that sends most, by group and collective."""

    group: str
    operation: str
    ranks: int
    payload: int
    sent: float
    seconds: float


@dataclass(frozen=True)
class PhasePlan:
    """Steps with one block size and one global batch."""

    steps: int
    global_batch: int
    block_size: int
    flops_per_token: float
    """Model FLOPs of a training step."""
    step: StepTime
    step_seconds: float
    mfu: float
    """Of the whole: model FLOPs over what all devices could do in a step."""
    limits: list[Part]
    """What a step costs a rank of the slowest stage, part by part; empty where a share of the peak was assumed."""


@dataclass(frozen=True)
class Plan:
    """What `python -m bd3_scale.plan` finds out. Bytes, seconds, FLOPs; `price` in the currency of the rate."""

    name: str
    world_size: int
    device: str
    precision: str
    parameters: ParameterCount
    total_parameters: int
    vocabulary: int
    layout: dict[str, Any]
    stage_layers: list[list[int]]
    """Layers of each pipeline rank, virtual stage by virtual stage."""
    steps: int
    tokens: int
    tokens_per_step: int
    """Of the longest phase, as the layout's micro-batches, shares, bubble and traffic."""
    draws: int
    """Of noise for each row."""
    shares: str
    """How the replicas share a step's rows, and what of the computed rows is filler."""
    filler: float
    """Share of the computed rows that are not data; it costs time and counts nowhere."""
    flops: float
    """Model FLOPs of the whole run."""
    flops_ratio: float
    """To those of a next-token run of the same network over the same tokens."""
    memory: list[RankMemory]
    """By pipeline rank."""
    fullest: int
    usable: int
    fits: bool
    bubble: float
    traffic: list[Moved]
    assumed_mfu: float | None
    """Share of the peak that was given; None: every part at its limit."""
    assumptions: str
    """What the parts are taken to reach."""
    phases: list[PhasePlan]
    seconds: float
    tokens_per_second: float
    device_hours: float
    price: float | None
    checkpoint_bytes: int
    texts: str | None
    """Where texts of the model end, if not where they will; see `data.packing.texts_end_at`."""
    host_bytes: int
    """On a node, for the copy that an asynchronous checkpoint makes."""

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        for record, one in zip(values["memory"], self.memory, strict=True):
            record["total"] = one.total
        return values


def make_plan(cluster: ClusterPlan, mfu: float | None = None, rate: float | None = None) -> Plan:
    """`mfu`: share of its peak that a device is taken to reach while it computes (None: every part at its limit); `rate`: price of a
    device for an hour."""
    recipe, parallel = cluster.recipe, cluster.parallel
    memory = [rank_memory(cluster, rank) for rank in range(parallel.pipeline)]
    fullest = max(range(parallel.pipeline), key=lambda rank: memory[rank].total)
    peak = cluster.world_size * cluster.device.peak(cluster.precision)
    phases, flops = [], 0.0
    for phase in cluster.phases:
        per_token = row_flops(cluster, phase).model / recipe.model.context
        slowest = pace(cluster, phase, mfu)
        step = step_at(cluster, phase, slowest)
        per_step = phase.rows * recipe.model.context * per_token
        reached, parts = per_step / (step.total * peak), _parts(cluster, phase, slowest)
        phases.append(
            PhasePlan(phase.steps, phase.rows * recipe.objective.draws, phase.block_size, per_token, step, step.total, reached, parts)
        )
        flops += phase.steps * per_step
    total = recipe.batches.samples_before(recipe.total_steps)
    seconds = sum(phase.steps * phase.step_seconds for phase in phases)
    hours = seconds / 3600 * cluster.world_size
    steps, tokens, shares = recipe.total_steps, total * recipe.model.context, cluster.shares()
    counted = count_parameters(recipe.model, cluster.vocabulary)
    saved = checkpoint_bytes(recipe.model, recipe.training, cluster.vocabulary)
    on_node = min(cluster.device.per_node, cluster.world_size)
    busiest = max(range(parallel.pipeline), key=lambda rank: sum(one.sent for one in traffic_of(cluster, cluster.longest, rank)))
    return Plan(
        name=recipe.run.name,
        world_size=cluster.world_size,
        device=cluster.device.name,
        precision=cluster.precision,
        parameters=counted,
        total_parameters=counted.total,
        vocabulary=cluster.vocabulary,
        layout={
            "tensor": parallel.tensor,
            "sequence": parallel.sequence,
            "pipeline": parallel.pipeline,
            "virtual_stages": parallel.virtual_stages,
            "context": parallel.context,
            "data": cluster.replicas,
            "zero": parallel.zero,
            "engine": parallel.resolved_engine,
            "shard": cluster.sharers if parallel.zero else 1,
            "micro_batch": shares.micro_batch,
            "micro_batches": shares.micro_batches,
            "recompute": recipe.training.recompute,
        },
        stage_layers=[[len(layers) for layers in cluster.stages_of(rank)] for rank in range(parallel.pipeline)],
        steps=steps,
        tokens=tokens,
        tokens_per_step=cluster.longest.rows * recipe.model.context,
        draws=recipe.objective.draws,
        shares=str(shares),
        filler=shares.filler,
        flops=flops,
        flops_ratio=flops / (total * autoregressive_flops(cluster)),
        memory=memory,
        fullest=fullest,
        usable=cluster.device.usable,
        fits=memory[fullest].total <= cluster.device.usable,
        bubble=bubble_fraction(cluster),
        traffic=[
            Moved(one.group, one.operation, one.ranks, one.bytes, one.sent, one.sent / bandwidth(cluster, one.group))
            for one in traffic_of(cluster, cluster.longest, busiest)
        ],
        assumed_mfu=mfu,
        assumptions=_assumptions(cluster) if mfu is None else "",
        phases=phases,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        device_hours=hours,
        price=None if rate is None else hours * rate,
        checkpoint_bytes=saved,
        texts=texts_end_at(recipe.data.row_special, recipe.model.context),
        host_bytes=on_node * -(-saved // (parallel.tensor * parallel.pipeline * (cluster.sharers if parallel.zero else 1))),
    )


def _parts(cluster: ClusterPlan, phase: Phase, slowest: Pace) -> list[Part]:
    """Of a step: those of its micro-batches, and the optimizer's."""
    if slowest.limits is None:
        return []
    return [*(part.times(cluster.shares(phase).micro_batches) for part in slowest.limits.parts), slowest.limits.update]


def _assumptions(cluster: ClusterPlan) -> str:
    device, batch = cluster.device, cluster.batch(cluster.longest)
    reached, peak = device.reached, device.peak(cluster.precision)
    kernels = []
    for name, phase in {cluster.batch(phase).kernel: phase for phase in cluster.phases}.items():
        forward, backward = attention_shares(cluster, cluster.batch(phase))
        kernels.append(f"{name} {forward:.0%} forward and {backward:.0%} backward, on the tiles that are visited")
    compiled = cluster.training.compile != "none"
    return (
        f"products {reached.product:.0%} of {peak / 1e12:.4g} TFLOP/s and their operands moved once; attention of heads of "
        f"{batch.config.head_size}: {'; '.join(kernels)}; memory {reached.memory:.0%} of {device.bandwidth / 1e12:.3g} TB/s; "
        f"layers {'compiled' if compiled else 'eager'} (bd3_scale/planning/devices.py has the sources)"
    )


# -- For people --------------------------------------------------------------------------------------------------------


def as_text(plan: Plan) -> str:
    """Some twenty lines."""
    layout = plan.layout
    parts = [f"{name} {layout[name]}" for name in ("tensor", "pipeline", "data")]
    if layout["context"] > 1:
        parts.insert(2, f"context {layout['context']}")
    parts[0] += " (sequence)" if layout["sequence"] else ""
    parts[1] += f" x {layout['virtual_stages']} virtual" if layout["virtual_stages"] > 1 else ""
    draws = "" if plan.draws == 1 else f" of {plan.draws} draws"
    again = "" if layout["recompute"] == "none" else f", recomputed: {layout['recompute']}"
    shares = ", ".join(f"{name} {count(number)}" for name, number in asdict(plan.parameters).items() if number)
    lines = [
        f"{plan.name} on {plan.world_size} x {plan.device}, {plan.precision}",
        f"parameters  {plan.total_parameters:,} ({shares})",
        f"layout      {' x '.join(parts)}, ZeRO {layout['zero']}{again}",
        f"step        {layout['micro_batches']} micro-batches of {layout['micro_batch']} rows{draws} on each of {layout['data']} replicas: "
        f"{plan.tokens_per_step:,} data tokens",
        *([f"            {plan.shares}"] if plan.filler else []),
        f"run         {plan.steps:,} steps, {plan.tokens:,} data tokens, {plan.flops:.3g} FLOPs: "
        f"{plan.flops_ratio:.2f} x those of a next-token run",
        "",
        *_memory(plan),
        "",
        *_traffic(plan),
        "",
        *_limits(plan),
    ]
    for phase in plan.phases:
        step = phase.step
        spent = ", ".join(
            f"{name} {seconds(value)}"
            for name, value in (
                ("compute", step.compute),
                ("waiting for the host", step.host),
                ("optimizer", step.update),
                ("bubble", step.bubble),
                ("tensor", step.tensor),
                ("data", step.data),
                ("context", step.context),
                ("pipeline", step.pipeline),
            )
            if value
        )
        of = f"{phase.steps:,} steps at {_name(phase, plan)}: " if len(plan.phases) > 1 else ""
        lines.append(f"time        {of}{phase.flops_per_token:.4g} FLOPs per data token; {seconds(phase.step_seconds)} a step ({spent})")
        assumed = "" if plan.assumed_mfu is None else f", {plan.assumed_mfu:.0%} assumed while a device computes"
        lines.append(f"            MFU {phase.mfu:.1%} of the whole{assumed}")
    bill = "" if plan.price is None else f", price {plan.price:,.0f}"
    lines += [
        f"in all      {plan.seconds / 86400:,.2f} days, {plan.tokens_per_second:,.0f} data tokens/s, "
        f"{plan.device_hours:,.1f} device hours{bill}",
        f"checkpoint  {size(plan.checkpoint_bytes)} each; {size(plan.host_bytes)} of host memory on a node while one is written",
        *([] if plan.texts is None else [f"texts       {plan.texts}"]),
    ]
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    kinds = [*RankMemory.__dataclass_fields__, "total"]
    lines = ["memory of a rank, by stage", "stage  layers    " + "".join(f"{kind:>12s}" for kind in kinds)]
    for rank, one in enumerate(plan.memory):
        layers = "+".join(str(number) for number in plan.stage_layers[rank])
        mark = "  <- fullest" if rank == plan.fullest and len(plan.memory) > 1 else ""
        lines.append(f"{rank:5d}  {layers:10s}" + "".join(f"{size(getattr(one, kind)):>12s}" for kind in kinds) + mark)
    most = plan.memory[plan.fullest].total
    verdict = "fits" if plan.fits else f"DOES NOT FIT ({CURE})"
    lines.append(f"{verdict}: {size(most)} of {size(plan.usable)} that a program can use of {plan.device}")
    return lines


def _traffic(plan: Plan) -> list[str]:
    lines = [f"bubble      {plan.bubble:.1%} of a step" if plan.layout["pipeline"] > 1 else "bubble      none (one stage)"]
    if not plan.traffic:
        return [*lines, "moved       nothing (one rank)"]
    for index, one in enumerate(plan.traffic):
        name = "moved" if index == 0 else ""
        what = one.operation.replace("_", "-")
        lines.append(
            f"{name:11s} {one.group}, {what} among {one.ranks}: {size(one.payload)}, of which a rank sends {size(one.sent)} a step "
            f"({seconds(one.seconds)})"
        )
    return lines


def _limits(plan: Plan) -> list[str]:
    """The parts of a step and what else it waits for, in ms, with a column for each phase."""
    if plan.assumed_mfu is not None:
        return []
    columns = [
        {part.name: part for part in phase.limits}
        | {
            name: Part(name, value, 0.0)
            for name, value in (
                ("the host", phase.step.host),
                ("bubble", phase.step.bubble),
                ("tensor ranks", phase.step.tensor),
                ("data-parallel ranks", phase.step.data),
                ("stages", phase.step.pipeline),
            )
            if value
        }
        for phase in plan.phases
    ]
    names = list(dict.fromkeys(name for column in columns for name in column))
    heads = [_name(phase, plan) for phase in plan.phases]
    lines = [f"{'limits of a step, ms':31s}" + "".join(f"{head:>22s}" for head in heads)]
    for name in names:
        found = [column.get(name) for column in columns]
        lines.append(f"{name:31s}" + "".join(_limit(part, phase) for part, phase in zip(found, plan.phases, strict=True)))
    lines.append(f"{'MFU':31s}" + "".join(f"{phase.mfu:22.1%}" for phase in plan.phases))
    return [*lines, f"at          {plan.assumptions}", ""]


def _name(phase: PhasePlan, plan: Plan) -> str:
    batches = len({phase.global_batch for phase in plan.phases}) > 1
    return f"L' = {phase.block_size}" + (f", {phase.global_batch} rows" if batches else "")


def _limit(part: Part | None, phase: PhasePlan) -> str:
    return f"{'':22s}" if part is None else f"{1000 * part.seconds:14,.1f} {part.seconds / phase.step_seconds:7.1%}"


def size(number: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 / 10 else f"{number / 2**20:.1f} MiB" if number else "0"


def count(number: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
