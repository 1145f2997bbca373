"""The best layouts of a recipe on so many devices: all that fit, least expected time first.

Tried are tensor, context (of long rows) and pipeline sizes, interleaving, ZeRO stages (also by FSDP, and with a copy on each node),
micro-batches and recomputation; model, batch and budget stay as they are. Tensor parallelism stays on a node. Invariants: nothing is
listed that `rules.validate` would refuse; the order is by the time model of `estimate.py` (bubble, communication, computing), equals by
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bd3_scale.batches import Shares
from bd3_scale.planning.cluster_plan import ClusterPlan
from bd3_scale.planning.estimate import bubble_fraction, rank_memory, step_time
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.schema import ParallelConfig
from bd3_scale.recipe.text import as_yaml
from bd3_scale.rules.across_keys import works
from bd3_scale.rules.suggestions import Case, divisors

SHORTEST_SHARE = 4096
"""Positions."""


@dataclass(frozen=True)
class Found:
    """A layout, as overrides of the recipe, with what it would need."""

    overrides: list[str]
    memory: int
    """Bytes on the fullest rank."""
    seconds: float
    """Of the whole run."""
    bubble: float


def search(cluster: ClusterPlan, mfu: float | None = None, most: int = 10) -> list[Found]:
    """The `most` best layouts that fit; empty where none does."""
    tried: list[tuple[float, int, ClusterPlan]] = []
    for recipe in _recipes(cluster):
        other = replace(cluster, recipe=recipe)
        tried.append((sum(phase.steps * step_time(other, phase, mfu).total for phase in other.phases), len(tried), other))
    found: list[Found] = []
    for seconds, _, other in sorted(tried):  # what is slower than the best that fit need not be counted
        if len(found) >= most and seconds > found[-1].seconds:
            break
        memory = max(rank_memory(other, rank).total for rank in range(other.parallel.pipeline))
        if memory <= cluster.device.usable:
            found.append(
                Found(
                    _overrides(other.parallel, other.training.recompute, cluster.parallel),
                    memory,
                    seconds,
                    bubble_fraction(other),
                )
            )
    return sorted(found, key=lambda one: (one.seconds, one.memory))[:most]


def _recipes(cluster: ClusterPlan) -> Iterator[Recipe]:
    """Every layout worth trying that the rules allow."""
    recipe, world = cluster.recipe, cluster.world_size
    for tensor in divisors(world):
        if recipe.model.heads % tensor or tensor > cluster.device.per_node:
            continue
        for pipeline in divisors(world // tensor):
            if pipeline > recipe.model.layers:
                continue
            for context in _contexts(cluster, world // (tensor * pipeline)):
                for layout in _layouts(cluster, tensor, context, pipeline):
                    for recompute in ("none", "mlp", "attention", "layer"):
                        tried = replace(recipe, parallel=layout, training=replace(recipe.training, recompute=recompute))
                        if works(Case(tried, world, cluster.device.type, cluster.precision)):
                            yield tried


def _contexts(cluster: ClusterPlan, ranks: int) -> list[int]:
    """Doubling, as long as a rank still has positions enough to be worth a part of a row; and what the recipe asks for."""
    asked = cluster.parallel.context
    worth = [size for size in (2**power for power in range(1, 10)) if cluster.model.context // size >= SHORTEST_SHARE]
    return [size for size in sorted({1, asked, *worth}) if ranks % size == 0]


def _layouts(cluster: ClusterPlan, tensor: int, context: int, pipeline: int) -> Iterator[ParallelConfig]:
    replicas = cluster.world_size // (tensor * context * pipeline)
    whole = Shares(cluster.recipe.batches.largest, replicas)
    # Doubling: half the forwards each time, with the rows that they then have, which may be fewer.
    largest = [2**power for power in range(whole.share.bit_length())]
    micro_batches = sorted({replace(whole, largest=rows).micro_batch for rows in largest})
    base = replace(cluster.parallel, tensor=tensor, context=context, pipeline=pipeline, stage_layers=None, engine="auto", shard=None)
    sequence = tensor > 1 and cluster.model.context % (tensor * context) == 0
    virtual_stages = [v for v in (1, 2, 4, 8) if v == 1 or v * pipeline <= cluster.model.layers] if pipeline > 1 else [1]
    on_node = cluster.device.per_node // (tensor * context)  # data-parallel ranks, as these are neighbours
    ways: list[tuple[int, str, int | None]] = [(0, "auto", None), (1, "auto", None)]
    for zero in (2, 3) if replicas * context > 1 else ():
        ways += [(zero, "auto", None)] + ([(zero, "fsdp", None)] if pipeline == 1 else [])
        ways += [(zero, "fsdp", on_node)] if 1 < on_node < replicas else []
    for virtual in virtual_stages:
        for zero, engine, shard in ways:
            for micro_batch in micro_batches:
                yield replace(
                    base, virtual_stages=virtual, zero=zero, engine=engine, shard=shard, sequence=sequence, micro_batch=micro_batch
                )


def _overrides(parallel: ParallelConfig, recompute: str, asked: ParallelConfig) -> list[str]:
    values: dict[str, Any] = {
        "parallel.tensor": parallel.tensor,
        "parallel.sequence": parallel.sequence,
        "parallel.pipeline": parallel.pipeline,
        "parallel.virtual_stages": parallel.virtual_stages,
        "parallel.zero": parallel.zero,
        "parallel.micro_batch": parallel.micro_batch,
        "training.recompute": recompute,
    }
    values |= {"parallel.context": parallel.context} if parallel.context > 1 or asked.context > 1 else {}
    values |= {"parallel.stage_layers": None} if asked.stage_layers else {}
    values |= {f"parallel.{key}": getattr(parallel, key) for key in ("engine", "shard") if getattr(parallel, key) != getattr(asked, key)}
    return [f"{key}={as_yaml(value)}" for key, value in values.items()]


def as_text(found: list[Found], world_size: int, device: str) -> str:
    """A line for each, with what to add to the command."""
    if not found:
        return (
            f"no layout fits {world_size} x {device}: take more devices or larger ones, or a smaller model.context or training.global_batch"
        )
    lines = ["  days  bubble  memory of the fullest rank  overrides"]
    for one in found:
        lines.append(f"{one.seconds / 86400:6.2f}  {one.bubble:5.1%}  {one.memory / 2**30:22.1f} GiB  {' '.join(one.overrides)}")
    return "\n".join(lines)
