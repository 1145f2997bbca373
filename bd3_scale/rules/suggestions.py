"""What works instead of a recipe that does not: the nearest value of one key, or the nearest layout of the same ranks.

Here is only the search; what must hold is in `across_keys.py`, which asks. Invariants: nothing is proposed that was not
tried; the search for a layout changes nothing of the model; it takes milliseconds, at thousands of ranks, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from bd3_scale.batches import Shares
from bd3_scale.recipe.schema import ParallelConfig
from bd3_scale.recipe.stages import at_least
from bd3_scale.recipe.text import as_text

if TYPE_CHECKING:
    from bd3_scale.recipe.definition import Recipe

Changes = dict[str, Any]
"""{dotted key: value to set}."""


@dataclass(frozen=True)
class Case:
    """A recipe on `world_size` ranks; `device` and `precision` are None where no device is decided yet."""

    recipe: Recipe
    world_size: int
    device: str | None
    precision: str | None

    @property
    def parallel(self) -> ParallelConfig:
        return self.recipe.parallel

    @property
    def model_ranks(self) -> int:
        return self.parallel.tensor * self.parallel.context * self.parallel.pipeline

    @property
    def replicas(self) -> int:
        return self.world_size // self.model_ranks

    @property
    def shares(self) -> Shares:
        """How the replicas share the smallest global batch, which is the hardest to share; only where there is a replica."""
        return self.parallel.shares(self.replicas, self.recipe.batches.smallest)

    def changed(self, changes: Changes) -> Case:
        sections: dict[str, Changes] = {}
        for key, value in changes.items():
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = value
        changed = {section: replace(getattr(self.recipe, section), **values) for section, values in sections.items()}
        return replace(self, recipe=replace(self.recipe, **changed))

    def value(self, key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(self.recipe, section), name)


@dataclass(frozen=True)
class Problem:
    text: str
    cures: Callable[[], Iterable[str | None]]
    """What to do, best first; None for a choice that does not exist here. Called only when the problem is shown."""


WEIGHTS = {"tensor": 4, "pipeline": 3, "virtual_stages": 1, "micro_batch": 1}
"""What it costs to change a size, before its ratio counts."""
FILLER = 4
"""What it would cost if all rows that are computed were filler."""


def nearest_layout(
    case: Case,
    works: Callable[[Case], bool],
    wanted: ParallelConfig | None = None,
    accepted: Callable[[ParallelConfig], bool] = lambda found: True,
) -> str | None:
    """What to set so that the recipe works on these ranks, as near to `wanted` (default: what the recipe asks for) as can be.

    Nearest: fewest keys, those that only arrange the work before sizes, sizes by their ratio, little filler, and another global batch only
    where nothing else is left. Without `accepted` there is an answer where the model is sound: one rank per replica.
    """
    wanted = wanted or case.parallel
    tried = sorted((_distance(wanted, case, changes), index, changes) for index, changes in enumerate(_layouts(case)))
    for _, _, changes in tried:
        changed = case.changed(changes)
        if accepted(changed.parallel) and works(changed):
            return as_text(changes)
    return None


def _layouts(case: Case) -> Iterator[Changes]:
    """Every layout worth trying, as what is other than the recipe has it."""
    asked, model = case.parallel, case.recipe.model
    sizes = divisors(case.world_size)
    engines, shards = _either(asked.engine, "auto"), _either(asked.shard, None)
    switches = product(_either(asked.sequence, False), _either(asked.zero, 1), _either(asked.stage_layers, None), engines, shards)
    contexts = _either(asked.context, 1)
    for (sequence, zero, stage_layers, engine, shard), context, tensor, pipeline in product(switches, contexts, sizes, sizes):
        if case.world_size % (tensor * context * pipeline) or model.heads % tensor or pipeline > model.layers:
            continue
        for virtual in range(1, min(asked.virtual_stages, model.layers // pipeline) + 1) if pipeline > 1 else (1,):
            layout = {
                "parallel.tensor": tensor,
                "parallel.pipeline": pipeline,
                "parallel.virtual_stages": virtual,
                "parallel.stage_layers": stage_layers,
                "parallel.context": context,
                "parallel.sequence": sequence,
                "parallel.zero": zero,
                "parallel.engine": engine,
                "parallel.shard": shard,
            }
            for batch in _batches(case.changed(layout)):
                yield {key: value for key, value in (layout | batch).items() if value != case.value(key)}


def _either(asked: Any, plain: Any) -> list[Any]:
    return [asked] if asked == plain else [asked, plain]


def _batches(case: Case) -> Iterator[Changes]:
    """Global batch and micro-batch as they are, with smaller micro-batches where many are needed, with a row for every replica."""
    yield {}
    for micro_batch in fitting_micro_batches(case) if case.parallel.virtual_stages > 1 else ():
        yield {"parallel.micro_batch": micro_batch}
    if case.shares.global_batch < case.replicas:
        yield {"training.global_batch": at_least(case.recipe.training.global_batch, case.replicas * case.recipe.objective.draws)}


def fitting_micro_batches(case: Case) -> list[int]:
    """Micro-batches, at most the recipe's, that divide a replica's share on these ranks, largest first: they need no more filler."""
    share = case.shares.share
    limit = case.parallel.micro_batch or share
    return [size for size in reversed(divisors(share)) if size <= limit]


def _distance(wanted: ParallelConfig, case: Case, changes: Changes) -> float:
    shares = case.changed(changes).shares
    distance = FILLER * shares.filler
    for key in {*changes, "parallel.tensor", "parallel.pipeline"}:
        name = key.split(".")[1]
        before, now = getattr(wanted, name, None), changes.get(key, case.value(key))
        if key == "training.global_batch":
            distance += 20
        elif before != now:
            ratio = abs(math.log2((now or 1) / (before or 1))) if name in WEIGHTS else 0.0
            distance += WEIGHTS.get(name, 1) + ratio
    return distance


def divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def nearest(sizes: Iterable[int], wanted: int) -> list[int]:
    return sorted(sizes, key=lambda size: (abs(size - wanted), size))
