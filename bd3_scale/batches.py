"""How many rows each update takes, and how the data-parallel replicas share them.

A `BatchSchedule` counts: a phase begins with the first update before which at least so many samples (rows) were consumed; one that is over
before an update could begin it has none. Rows are rows of data, for each of which an objective may draw noise several times. `Shares` is
the one place that knows how many rows of a global batch each replica computes, and which. Any number of replicas up to the number of rows
works, so that a run goes on where a node is lost. All replicas compute the same number of micro-batches of the same number of rows, as
ZeRO 3 and pipelines need; what a replica has no row for is *filler*: it is computed, and counts nowhere.

Invariants: the rows of an update, the samples before it and the updates of a budget are functions of the schedule alone; every slot of
the global batch is one row of one replica; shares differ by at most one row; filler stands behind the real rows of a replica, in its last
micro-batch only; a replica's slots follow each other, in the order of the replicas; all of it is a function of the three numbers given.
Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True)
class Shares:
    """A global batch of so many rows on so many replicas, at most `largest` rows at a time (None: the whole share at once)."""

    global_batch: int
    replicas: int
    largest: int | None = None
    draws: int = 1
    """Of noise for each row; only said, never counted here."""

    @property
    def share(self) -> int:
        """Rows of the replicas that have most."""
        return -(-self.global_batch // self.replicas)

    @property
    def micro_batches(self) -> int:
        """Forwards of a step on every replica."""
        return -(-self.share // (self.largest or self.share))

    @property
    def micro_batch(self) -> int:
        """Rows of each forward, filler included: no more than it takes to have as few forwards. As `largest`, it gives itself."""
        return -(-self.share // self.micro_batches)

    @property
    def computed(self) -> int:
        """Rows of a step on all replicas, filler included."""
        return self.replicas * self.micro_batches * self.micro_batch

    @property
    def filler(self) -> float:
        """Share of the computed rows that is none of the batch."""
        return 1.0 - self.global_batch / self.computed

    def rows_of(self, replica: int) -> int:
        """Rows of the global batch that are this replica's: the first replicas have the ones that are left over."""
        each, left = divmod(self.global_batch, self.replicas)
        return each + (replica < left)

    def slots(self, replica: int) -> list[range]:
        """The slots of every micro-batch of a replica, without filler: a range that is short or empty is filled up."""
        each, left = divmod(self.global_batch, self.replicas)
        first = replica * each + min(replica, left)
        share = range(first, first + self.rows_of(replica))
        return [share[index * self.micro_batch : (index + 1) * self.micro_batch] for index in range(self.micro_batches)]

    def __str__(self) -> str:
        each = [str(rows) for rows in sorted({self.rows_of(0), self.rows_of(self.replicas - 1)}, reverse=True)]
        rows = "rows" if self.draws == 1 else f"rows of {self.draws} draws"
        text = f"{self.global_batch} {rows} on {self.replicas} replicas: {' or '.join(each)} each"
        return text if self.computed == self.global_batch else f"{text}, {100 * self.filler:.1f} % of the computed rows are filler"

    @property
    def remark(self) -> str | None:
        """What somebody who wrote the recipe may not expect of a step; None where there is nothing."""
        other = self.largest is not None and self.micro_batch != self.largest
        if not other and self.computed == self.global_batch:
            return None
        forwards = "one micro-batch" if self.micro_batches == 1 else f"{self.micro_batches} micro-batches"
        asked = f" (parallel.micro_batch is {self.largest})" if other else ""
        return f"{self}; {forwards} of {self.micro_batch}{asked}"
