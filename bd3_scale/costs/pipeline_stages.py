"""Which layers each pipeline stage holds: contiguous slices, as equal in cost as layers allow.

A stage costs what its slowest member computes: the first also embeds, the last has the head, and the network's last layer
is cheap because rows that are not scored yield keys and values only. Chunk c of the P x v chunks (v virtual stages a rank) lies on
pipeline rank c mod P, as megatron-core's interleaved schedule has it.

A run whose block size or global batch changes has phases, in which layers cost differently: its stages are cut for the mean over its steps.

Invariants: every layer is in exactly one chunk, every chunk has a layer, and no other division has a cheaper costliest chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.costs.flops import count_flops
from bd3_scale.objectives.noise import schedule_named
from bd3_scale.objectives.table import ObjectiveSchedule
from bd3_scale.objectives.time_density import TimeDensity, time_density
from bd3_scale.recipe.schema import ModelConfig, ObjectiveConfig, ParallelConfig
from bd3_scale.tuning.interval_tuner import TunerState

if TYPE_CHECKING:
    from bd3_scale.recipe import Recipe

FLOPS_PER_BYTE = 150
"""Machine balance of current GPUs (bf16 FLOP/s over memory bytes/s, derated), to weigh the embedding, which only moves memory."""


@dataclass(frozen=True)
class Phase:
    """Steps of a run with one attention pattern and one global batch: a stage of `objective.block_size`, or a part of it."""

    steps: int
    rows: int
    """Of data, in the global batch."""
    block_size: int
    pattern: AttentionPattern


def phases_of(recipe: Recipe, mask_id: int, device: str) -> tuple[Phase, ...]:
    """The phases of the whole run, in their order; at least one, each with at least one step. The block sizes of a mixture, which take
    turns, stand as phases of their shares."""
    total, batches = recipe.total_steps, recipe.batches
    schedule = ObjectiveSchedule.of(recipe, mask_id, device=device)
    changes = [start for start, _ in recipe.objective.stages(recipe.model.context)]
    starts = sorted({*changes, *(phase.step for phase in batches.phases)})
    found = []
    for start, end in zip(starts, [*starts[1:], total], strict=True):
        if start < min(end, total) or start == 0:
            shares = schedule.shares if len(schedule.shares) > 1 else {schedule.size_at(start): 1.0}
            for size, share in shares.items():
                objective, steps = schedule.of_size(size), max(1, round(share * (min(end, total) - start)))
                found.append(Phase(steps, batches.rows_at(start), objective.block_size, objective.pattern))
    return tuple(found)


def layer_costs(
    config: ModelConfig, pattern: AttentionPattern, vocabulary: int, selected: float, rows: int, simplex: bool = False
) -> tuple[list[float], float, float]:
    """(cost of each layer, of the embedding, of the head) of one micro-batch of `rows`, in FLOPs of a forward.

    The embedding's is the traffic of its gradient: V x hidden zeroed, scattered into and added, a third of it per pass; and the
    products of expected embeddings (`simplex`), of which there are two in the three passes of a step.
    """
    one = count_flops(replace(config, layers=1), pattern, vocabulary, selected, simplex)
    two = count_flops(replace(config, layers=2), pattern, vocabulary, selected, simplex)
    middle, last = float(two.layers - one.layers) * rows, float(one.layers) * rows
    embedding = 4.0 * vocabulary * config.hidden * FLOPS_PER_BYTE + 2 / 3 * one.embedding * rows
    return [*[middle] * (config.layers - 1), last], embedding, one.head * rows


def divide(costs: Sequence[float], chunks: int, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Layers of each chunk; `first` and `last` are what these two chunks cost beside their layers. Needs a layer per chunk."""
    count = len(costs)
    before = [0.0]
    for layer in costs:
        before.append(before[-1] + layer)

    def cost(chunk: int, start: int, stop: int) -> float:
        return before[stop] - before[start] + (first if chunk == 0 else 0.0) + (last if chunk == chunks - 1 else 0.0)

    limit = min(_divisions(count, chunks, lambda worst, chunk, start, stop: max(worst, cost(chunk, start, stop)))[-1][count])[0]

    def squares(total: float, chunk: int, start: int, stop: int) -> float:
        # Among the divisions that cost no more: even ones, since the first stages hold the most micro-batches at a time.
        own = cost(chunk, start, stop)
        return total + own * own if own <= limit * (1 + 1e-12) else math.inf

    best = _divisions(count, chunks, squares)
    bounds = [count]
    for chunk in reversed(range(chunks)):
        bounds.append(min(best[chunk][bounds[-1]])[1])
    bounds.reverse()
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _divisions(count: int, chunks: int, add: Callable[[float, int, int, int], float]) -> list[dict[int, list[tuple[float, int]]]]:
    """[chunk][n]: (value, where the chunk starts) of all ways in which the chunks up to this one hold the first n layers, each
    way going on from the best of the chunk before. `add(value so far, chunk, start, stop)` is the value with one more chunk."""
    found: list[dict[int, list[tuple[float, int]]]] = [{n: [(add(0.0, 0, 0, n), 0)] for n in range(1, count - chunks + 2)}]
    for chunk in range(1, chunks):
        before = {n: min(ways)[0] for n, ways in found[-1].items()}
        ends = range(chunk + 1, count - chunks + chunk + 2)
        found.append({stop: [(add(before[start], chunk, start, stop), start) for start in range(chunk, stop)] for stop in ends})
    return found


def given(layers: Sequence[int]) -> list[range]:
    """The chunks that a recipe asks for by their numbers of layers."""
    bounds = [sum(layers[:chunk]) for chunk in range(len(layers) + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def of_rank(chunks: Sequence[range], pipeline: int, pipeline_rank: int) -> list[range]:
    """The chunks of one pipeline rank, virtual stage by virtual stage."""
    return list(chunks[pipeline_rank::pipeline])


def micro_batch_group(micro_batches: int, stages: int) -> int:
    """Micro-batches that an interleaved schedule runs through one virtual stage before the next: the fewest that it takes."""
    sizes = range(min(stages, micro_batches), micro_batches + 1)
    return next(size for size in sizes if micro_batches % size == 0 or micro_batches % size >= stages)


def chunks_of(
    model: ModelConfig, objective: ObjectiveConfig, parallel: ParallelConfig, replicas: int, vocabulary: int, phases: Sequence[Phase]
) -> list[range]:
    """The layers of every chunk, pipeline x virtual stages of them, among `replicas` data-parallel ranks: those that the recipe
    gives, or by cost."""
    if parallel.stage_layers is not None:
        return given(parallel.stage_layers)
    mean = [0.0] * (model.layers + 2)
    for phase in phases:
        share, shares = selected_share(objective, phase.pattern), parallel.shares(replicas, phase.rows)
        costs, embedding, head = layer_costs(model, phase.pattern, vocabulary, share, shares.micro_batch, objective.traits.on_simplex)
        mean = [sum + phase.steps * shares.micro_batches * cost for sum, cost in zip(mean, [*costs, embedding, head], strict=True)]
    return divide(mean[:-2], parallel.pipeline * parallel.virtual_stages, *mean[-2:])


def selected_share(objective: ObjectiveConfig, pattern: AttentionPattern, tuning: TunerState | None = None) -> float:
    """Expected share of the data tokens that reach the head in training, on the interval and with the density of `tuning`, if any."""
    if pattern.kind == "causal" or objective.traits.scores_every_token:
        return 1.0
    (beta, omega), learned = (objective.interval, ()) if tuning is None else (tuning.interval, tuning.density)
    return expected_masked(
        objective.noise_schedule, time_density((beta, omega), objective.density, tuple(objective.density_shape or ()), learned)
    )


@lru_cache(maxsize=64)
def expected_masked(schedule: str, density: TimeDensity) -> float:
    """Mean mask probability at t of this density (midpoint rule: exact for the linear schedule with a uniform one)."""
    times, _ = density.draw((np.arange(1000) + 0.5) / 1000)
    return float(schedule_named(schedule).mask_probability(times).mean())
