"""A whole number of a recipe that may change during a run: `n`, or `[[from, n], ...]`, where the stages begin at 0 and ascend.

What they begin at (steps, samples) and what the number is are the key's. Nothing here needs torch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from bd3_scale.batches import BatchPhase, BatchSchedule
from bd3_scale.errors import RecipeError


def stages(key: str, value: Any, *, counted: str, number: str, least: str, example: str) -> tuple[tuple[int, int], ...]:
    """((0, n), (from, n), ...), ascending. Raises RecipeError, which names `key`, for anything else. `counted`: what the stages
    begin at, in the singular; `number`: what n is; `least`: why it is not 0."""
    shape = f"a whole number or a list of [from {counted}, {number}], such as {example}"
    if _whole(value):
        value = [[0, value]]
    elif not isinstance(value, (list, tuple)) or not value:
        raise RecipeError(f"{key} is {value!r}; set {shape}")
    found: list[tuple[int, int]] = []
    for stage in value:
        if not isinstance(stage, (list, tuple)) or len(stage) != 2 or not all(map(_whole, stage)):
            raise RecipeError(f"{key} has the entry {stage!r}; set {shape}")
        if stage[1] < 1:
            raise RecipeError(f"{key} is {stage[1]}, but {least}; set 1 or more")
        found.append((int(stage[0]), int(stage[1])))
    if found[0][0] != 0:
        raise RecipeError(f"{key} starts at {counted} {found[0][0]}, which leaves the {counted}s before without one; start at {counted} 0")
    for (earlier, _), (later, _) in pairwise(found):
        if later <= earlier:
            raise RecipeError(f"{key} has {counted} {later} after {counted} {earlier}; put the {counted}s in ascending order")
    return tuple(found)


def batch_schedule(value: Any, draws: int = 1) -> BatchSchedule:
    """What `training.global_batch` says, which counts `draws` rows for each of data. Raises RecipeError for anything else."""
    phases: list[BatchPhase] = []
    step, samples = 0, 0
    for start, noisy in _batch_stages(value):
        rows, left = divmod(noisy, draws)
        if left:
            fitting = next(size for size in range(draws, 0, -1) if noisy % size == 0)
            raise RecipeError(
                f"training.global_batch has {noisy} noisy rows, but objective.draws = {draws} makes {draws} of each row of data; set "
                f"{(rows + 1) * draws} rows, or objective.draws={fitting}"
            )
        if phases:
            more = max(0, -(-(start - samples) // phases[-1].rows))
            step, samples = step + more, samples + more * phases[-1].rows
            if phases[-1].step == step:
                phases.pop()  # the samples of its updates already reach this one
        if not phases or phases[-1].rows != rows:
            phases.append(BatchPhase(step, samples, rows))
    return BatchSchedule(tuple(phases))


def at_least(value: Any, rows: int) -> Any:
    """`value` of `training.global_batch` with no batch below `rows` noisy rows."""
    raised = [[start, max(rows, size)] for start, size in _batch_stages(value)]
    kept = [stage for index, stage in enumerate(raised) if index == 0 or stage[1] != raised[index - 1][1]]
    return kept if len(kept) > 1 else kept[0][1]


def _batch_stages(value: Any) -> tuple[tuple[int, int], ...]:
    return stages(
        "training.global_batch",
        value,
        counted="sample",
        number="rows",
        least="a batch has at least one row",
        example="[[0, 64], [1000000, 128], [4000000, 256]]",
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
