"""How the data-parallel replicas share a global batch: the one place that knows how many rows each computes, and which.

Any number of replicas up to the number of rows works, so that a run goes on where a node is lost. All replicas compute the same
number of micro-batches of the same number of rows, as ZeRO 3 and pipelines need; what a replica has no row for is *filler*: it is
computed, and counts nowhere.

Invariants: every slot of the global batch is one row of one replica; shares differ by at most one row; filler stands behind the
real rows of a replica, in its last micro-batch only; a replica's slots follow each other, in the order of the replicas; all of it is a
function of the three numbers given. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shares:
    """A global batch of so many rows on so many replicas, at most `largest` rows at a time (None: the whole share at once)."""

    global_batch: int
    replicas: int
    largest: int | None = None

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
        text = f"{self.global_batch} rows on {self.replicas} replicas: {' or '.join(each)} each"
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
