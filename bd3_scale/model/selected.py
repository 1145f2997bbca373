"""Selected rows: where only some rows are scored, the network's last layer computes nothing for the others but keys and values.

Which rows those are is known before the step (`NetworkInputs.selected`). The last layer takes them out of the hidden states once,
[rows, batch, hidden] -> [n, hidden], and from there on is the same code on fewer rows. Attention alone keeps the shape that its
kernels know: the queries of the others are zeros, their outputs are dropped, so that nothing comes back to them either.

Where ranks divide the rows (see `sequence_shards.py`), how many of them a rank has selected is the data's choice, which no shape may
follow. So the n rows are divided anew, n / R to a rank: each puts what it has of them into their places, zeros elsewhere, and a
reduce-scatter hands every rank its part; a sum of one row and zeros is exact. From there on they are rows divided as any others.

Invariant: padding (weight 0) repeats row 0 of sample 0, which no objective selects (token 0 is never masked), and adds nothing to any
gradient: were that row selected, `spread` would count what comes back to it once for each repetition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_scale.compiling import of_any_size
from bd3_scale.distributed.sequence_shards import Stream
from bd3_scale.megatron_core import parallel_state, reduce_scatter_to_sequence_parallel_region


@dataclass(frozen=True)
class SelectedRows:
    """n rows of the scored half of a micro-batch of `batch` samples; `of` makes them from what the objective selects."""

    stream: Stream
    batch: int
    places: Tensor
    """int64 [n]: row * batch + sample of all of them, where they lie in the undivided scored half [L, batch, ...]."""
    samples: Tensor
    """int64 [n / ranks]: the sample of each that this rank holds once they are taken."""
    row_ids: Tensor
    """int64 [n / ranks]: its row in that sample's undivided stream."""

    @staticmethod
    def of(selected: Tensor, stream: Stream, batch: int) -> SelectedRows:
        """`selected` int64 [n]: flat index b * L + i. Raises ValueError where n cannot be divided over the ranks."""
        if len(selected) % stream.ranks:
            raise ValueError(f"{len(selected)} selected positions cannot be divided over {stream.ranks} tensor ranks: pad them")
        length = stream.pattern.scored_rows
        samples, rows = selected // length, selected % length
        part = len(selected) // stream.ranks
        mine = slice(stream.rank * part, (stream.rank + 1) * part)
        row_ids = stream.pattern.undivided_rows(rows[mine])
        places, samples, rows = (of_any_size(each, 0) for each in (rows * batch + samples, samples[mine], row_ids))
        return SelectedRows(stream, batch, places, samples, rows)

    def take(self, x: Tensor) -> Tensor:
        """x [rows of this rank, batch, hidden] -> [n / ranks, hidden]."""
        held = x[: self.stream.scored].flatten(0, 1)
        if self.stream.ranks == 1:
            return held.index_select(0, self.places)
        place = self.places - self.stream.rank * len(held)
        here = (place >= 0) & (place < len(held))
        # The remainder is some row of this rank's for those of others: spread out, as their zero gradients all meet in it.
        rows = torch.where(here[:, None], held.index_select(0, place % len(held)), 0.0)
        # By name: compiled code cannot trace the warning that megatron-core gives where it looks the group up.
        return reduce_scatter_to_sequence_parallel_region(rows, group=parallel_state.get_tensor_model_parallel_group())

    def spread(self, q: Tensor) -> Tensor:
        """Queries of all n rows, [n, heads, d] -> [L, batch, heads, d], zeros for all others."""
        length = self.stream.pattern.scored_rows
        # index_copy would keep q for a backward that does not need it.
        return q.new_zeros(length * self.batch, *q.shape[1:]).index_put((self.places,), q).unflatten(0, (length, self.batch))

    def collect(self, out: Tensor) -> Tensor:
        """[L, batch, ...] -> [n, ...]: what attention gave them."""
        return out.flatten(0, 1).index_select(0, self.places)

    def apply(self, function: Callable[..., Tensor], rows: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
        """function(*rows, *vectors) of rows [n / ranks, hidden] and vectors [1, hidden], or [batch, hidden], of which each row has its
        sample's."""
        return function(*rows, *(vector if len(vector) == 1 else vector.index_select(0, self.samples) for vector in vectors))
