"""How many rows each update takes: always as many, or a schedule over the samples (rows) that were consumed before it.

A phase of the schedule begins with the first update before which at least so many samples were consumed; a phase that is over before an
update could begin it has none. Invariant: the rows of an update, the samples before it and the updates of a budget are functions
of the schedule alone. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bd3_scale.recipe.stages import stages


@dataclass(frozen=True)
class BatchPhase:
    """Updates of `rows` rows, from update `step` on, before which `samples` samples were consumed."""

    step: int
    samples: int
    rows: int


@dataclass(frozen=True)
class BatchSchedule:
    """Phases in their order, the first at step 0; each of the others begins with an update."""

    phases: tuple[BatchPhase, ...]

    @property
    def largest(self) -> int:
        """Most rows of an update, however long the run is."""
        return max(phase.rows for phase in self.phases)

    @property
    def smallest(self) -> int:
        return min(phase.rows for phase in self.phases)

    def rows_at(self, step: int) -> int:
        """Rows of update `step` (0 for the first)."""
        return self._at(step).rows

    def rows_after(self, samples: int) -> int:
        """Rows of the update that begins when `samples` samples are consumed."""
        return self._after(samples).rows

    def samples_before(self, step: int) -> int:
        """Samples that the first `step` updates consume."""
        phase = self._at(step)
        return phase.samples + (step - phase.step) * phase.rows

    def steps_for(self, samples: int) -> int:
        """The fewest updates that consume at least `samples` samples."""
        phase = self._after(samples)
        return phase.step + -(-(samples - phase.samples) // phase.rows)

    def begins(self, step: int) -> bool:
        """Whether update `step` has another number of rows than the one before it."""
        return any(phase.step == step for phase in self.phases[1:])

    def _at(self, step: int) -> BatchPhase:
        return next(phase for phase in reversed(self.phases) if phase.step <= step)

    def _after(self, samples: int) -> BatchPhase:
        return next(phase for phase in reversed(self.phases) if phase.samples <= samples)


def batch_schedule(value: Any) -> BatchSchedule:
    """What `training.global_batch` says. Raises RecipeError for anything else."""
    phases: list[BatchPhase] = []
    step, samples = 0, 0
    for start, rows in _stages(value):
        if phases:
            more = max(0, -(-(start - samples) // phases[-1].rows))
            step, samples = step + more, samples + more * phases[-1].rows
            if phases[-1].step == step:
                phases.pop()  # the samples of its updates already reach this one
        if not phases or phases[-1].rows != rows:
            phases.append(BatchPhase(step, samples, rows))
    return BatchSchedule(tuple(phases))


def at_least(value: Any, rows: int) -> Any:
    """`value` of `training.global_batch` with no batch below `rows`."""
    raised = [[start, max(rows, size)] for start, size in _stages(value)]
    kept = [stage for index, stage in enumerate(raised) if index == 0 or stage[1] != raised[index - 1][1]]
    return kept if len(kept) > 1 else kept[0][1]


def _stages(value: Any) -> tuple[tuple[int, int], ...]:
    return stages(
        "training.global_batch",
        value,
        counted="sample",
        number="rows",
        least="a batch has at least one row",
        example="[[0, 64], [1000000, 128], [4000000, 256]]",
    )
