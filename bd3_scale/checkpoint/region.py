"""Which elements of an unsharded tensor a piece of it holds: arithmetic on numbers alone, imported without torch.

A tensor of the unsharded model is divided by tensor parallelism along one dimension (dim, offset, size) and then by ZeRO
into a flat range [start, stop) of that slice. A `Region` says this for one piece; everything else is derived from its
*runs*: the maximal stretches of consecutive elements of the flattened full tensor that it covers. Two regions of one
tensor, however they were divided, meet where their runs meet, so one function carries any layout into any other.

Invariants: runs are sorted and disjoint, and the order of a region's elements is their order in the full tensor; all maths
is on numpy arrays of runs, never per element; nothing here knows about files, ranks or process groups, and nothing needs torch,
since the process that makes the index of a large checkpoint (index_process.py) has to start quickly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

KIND = re.compile("[a-z][a-z0-9_]*")
"""A kind of what is saved of a parameter: weight, ema, or the name of an optimizer's state."""


class ContiguousRuns(NamedTuple):
    """Stretches of consecutive elements; int64 arrays of equal length, sorted by `start`."""

    start: np.ndarray
    """First element, in the flattened full tensor."""
    length: np.ndarray
    local: np.ndarray
    """First element, in the region."""


class CopyPlan(NamedTuple):
    """The elements that two regions share, as copies; int64 arrays of equal length, all ascending and disjoint."""

    length: np.ndarray
    source: np.ndarray
    """First element, in the source region."""
    target: np.ndarray
    """First element, in the target region."""


@dataclass(frozen=True)
class Region:
    """The elements flatten(full.narrow(dim, offset, size))[start:stop] of a tensor of `shape`.

    A tensor that is not divided has dim = 0, offset = 0, size = shape[0]; a scalar (shape ()) counts as shape (1,).
    Raises ValueError where the numbers do not lie inside the tensor.
    """

    shape: tuple[int, ...]
    dim: int
    offset: int
    size: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        numbers = (*self.shape, self.dim, self.offset, self.size, self.start, self.stop)
        if any(type(number) is not int for number in numbers):
            raise ValueError(f"a region is made of integers, not {numbers}")
        if any(extent < 1 for extent in self.shape):
            raise ValueError(f"shape {list(self.shape)} has an extent below 1")
        if not 0 <= self.dim < len(self._extents):
            raise ValueError(f"dim {self.dim} is not one of the {len(self._extents)} of shape {list(self.shape)}")
        if self.offset < 0 or self.size < 1 or self.offset + self.size > self._extents[self.dim]:
            raise ValueError(f"slice {self.offset}:{self.offset + self.size} is not inside dim {self.dim} of shape {list(self.shape)}")
        if not 0 <= self.start <= self.stop <= self._row * self._outer:
            raise ValueError(f"range {self.start}:{self.stop} is not inside the {self._row * self._outer} elements of the slice")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """All elements of a tensor."""
        return cls.flat(shape, 0, math.prod(shape))

    @classmethod
    def flat(cls, shape: Sequence[int], start: int, stop: int) -> Region:
        """Elements [start, stop) of the flattened tensor."""
        return cls(tuple(shape), 0, 0, shape[0] if len(shape) else 1, start, stop)

    @classmethod
    def divided(cls, shape: Sequence[int], dim: int, offset: int, size: int) -> Region:
        """All elements of full.narrow(dim, offset, size)."""
        return cls(tuple(shape), dim, offset, size, 0, math.prod(shape) // shape[dim] * size)

    @property
    def _extents(self) -> tuple[int, ...]:
        return self.shape or (1,)

    @property
    def _outer(self) -> int:
        return math.prod(self._extents[: self.dim])

    @property
    def _inner(self) -> int:
        return math.prod(self._extents[self.dim + 1 :])

    @property
    def _row(self) -> int:
        """Elements of the slice that are neighbours in the full tensor."""
        return self.size * self._inner

    @property
    def numel(self) -> int:
        """Elements of the region."""
        return self.stop - self.start

    @property
    def full_numel(self) -> int:
        """Elements of the full tensor."""
        return math.prod(self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """[first, last + 1) element of the flattened full tensor; everything of the region lies inside. Empty: (0, 0)."""
        if self.numel == 0:
            return 0, 0
        return self._full(self.start), self._full(self.stop - 1) + 1

    def _full(self, element: int) -> int:
        """Element of the slice -> element of the flattened full tensor."""
        row, rest = divmod(element, self._row)
        return (row * self._extents[self.dim] + self.offset) * self._inner + rest

    def part(self, start: int, stop: int) -> Region:
        """Elements [start, stop) of this region."""
        return Region(self.shape, self.dim, self.offset, self.size, self.start + start, self.start + stop)

    def runs(self) -> ContiguousRuns:
        """The region as stretches of the flattened full tensor, in order."""
        if self.numel == 0:
            empty = np.zeros(0, dtype=np.int64)
            return ContiguousRuns(empty, empty, empty)
        if self.size == self._extents[self.dim] or self._outer == 1:
            # The slice is one stretch of the full tensor.
            return ContiguousRuns(*(np.array([value], dtype=np.int64) for value in (self._full(self.start), self.numel, 0)))
        rows = np.arange(self.start // self._row, (self.stop - 1) // self._row + 1, dtype=np.int64)
        begin = np.maximum(rows * self._row, self.start)
        end = np.minimum((rows + 1) * self._row, self.stop)
        full = (rows * self._extents[self.dim] + self.offset) * self._inner + (begin - rows * self._row)
        return ContiguousRuns(full, end - begin, begin - self.start)

    def select(self, full: torch.Tensor) -> torch.Tensor:
        """The region's elements of the full tensor, 1-D: the definition of a region (a view where the elements are neighbours)."""
        return full.reshape(self._extents).narrow(self.dim, self.offset, self.size).reshape(-1)[self.start : self.stop]


def kind_order(kind: str) -> tuple[int, str]:
    """Sorting key of kinds, the order in which they are written: weight, the optimizer's states by name, ema."""
    return {"weight": 0, "ema": 2}.get(kind, 1), kind


def intersect(source: Region, target: Region) -> CopyPlan:
    """The elements that two regions of one tensor share. Raises ValueError for regions of different shapes."""
    if source.shape != target.shape:
        raise ValueError(f"regions of different tensors: {list(source.shape)} and {list(target.shape)}")
    (source_first, source_last), (target_first, target_last) = source.span, target.span
    if source_last <= target_first or target_last <= source_first:
        empty = np.zeros(0, dtype=np.int64)
        return CopyPlan(empty, empty, empty)
    a, b = source.runs(), target.runs()
    a_end, b_end = a.start + a.length, b.start + b.length
    # Both are sorted and disjoint, so the runs of b that meet run i of a are b[first[i]:last[i]].
    first = np.searchsorted(b_end, a.start, side="right")
    last = np.searchsorted(b.start, a_end, side="left")
    count = np.maximum(last - first, 0)
    i = np.repeat(np.arange(len(count)), count)
    j = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    begin = np.maximum(a.start[i], b.start[j])
    end = np.minimum(a_end[i], b_end[j])
    return CopyPlan(end - begin, a.local[i] + (begin - a.start[i]), b.local[j] + (begin - b.start[j]))


def tiling_fault(shape: Sequence[int], regions: Sequence[Region]) -> str | None:
    """None where the regions cover every element of a tensor of `shape` exactly once; otherwise what is wrong, in words."""
    numel = math.prod(shape)
    runs = [region.runs() for region in regions]
    start = np.concatenate([np.zeros(0, dtype=np.int64), *(run.start for run in runs)])
    length = np.concatenate([np.zeros(0, dtype=np.int64), *(run.length for run in runs)])
    order = np.argsort(start, kind="stable")
    # What each run must start with: the end of the run before. The end of the last must be the end of the tensor.
    due = np.concatenate([[0], (start + length)[order]])
    start = np.concatenate([start[order], [numel]])
    wrong = np.flatnonzero(start != due)
    if len(wrong) == 0:
        return None
    at = wrong[0]
    return f"element {due[at]} is in no part" if start[at] > due[at] else f"element {start[at]} is in two parts"
