"""Where the elements of a rank lie in the unsharded tensors, and how they get from any layout into any other.

A tensor of the unsharded model is divided by tensor parallelism along one dimension (dim, offset, size) and then by ZeRO
into a flat range [start, stop) of that slice. A `Region` says this for one piece; everything else is derived from its
*runs*: the maximal stretches of consecutive elements of the flattened full tensor that it covers. Two regions of one
tensor, however they were divided, meet where their runs meet, so one function carries any layout into any other.

Invariants: runs are sorted and disjoint, and the order of a region's elements is their order in the full tensor; all maths
is on numpy arrays of runs, never per element; nothing here knows about files, ranks or process groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
"""What is saved of a parameter, in the order in which it is written."""


class Runs(NamedTuple):
    """Stretches of consecutive elements; int64 arrays of equal length, sorted by `start`."""

    start: np.ndarray
    """First element, in the flattened full tensor."""
    length: np.ndarray
    local: np.ndarray
    """First element, in the region."""


class Pieces(NamedTuple):
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

    def runs(self) -> Runs:
        """The region as stretches of the flattened full tensor, in order."""
        if self.numel == 0:
            empty = np.zeros(0, dtype=np.int64)
            return Runs(empty, empty, empty)
        if self.size == self._extents[self.dim] or self._outer == 1:
            # The slice is one stretch of the full tensor.
            return Runs(*(np.array([value], dtype=np.int64) for value in (self._full(self.start), self.numel, 0)))
        rows = np.arange(self.start // self._row, (self.stop - 1) // self._row + 1, dtype=np.int64)
        begin = np.maximum(rows * self._row, self.start)
        end = np.minimum((rows + 1) * self._row, self.stop)
        full = (rows * self._extents[self.dim] + self.offset) * self._inner + (begin - rows * self._row)
        return Runs(full, end - begin, begin - self.start)

    def select(self, full: torch.Tensor) -> torch.Tensor:
        """The region's elements of the full tensor, 1-D: the definition of a region (a view where the elements are neighbours)."""
        return full.reshape(self._extents).narrow(self.dim, self.offset, self.size).reshape(-1)[self.start : self.stop]


@dataclass(frozen=True, eq=False)
class Fragment:
    """What one rank holds of one tensor: a live 1-D fp32 view of the engine's state, in the order of `region`.

    Raises ValueError where the value is not that.
    """

    kind: str
    name: str
    region: Region
    value: torch.Tensor

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fragment of {self.name}: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.value.dtype != torch.float32 or self.value.shape != (self.region.numel,):
            raise ValueError(
                f"fragment {self.kind} of {self.name} must be fp32 of shape ({self.region.numel},), "
                f"not {self.value.dtype} of {tuple(self.value.shape)}"
            )

    @property
    def order(self) -> tuple[int, str, int, int, int, int, int]:
        """Sorting key: the one order in which fragments are shared and written, whatever the caller's."""
        region = self.region
        return KINDS.index(self.kind), self.name, region.span[0], region.dim, region.offset, region.size, region.start

    def part(self, start: int, stop: int) -> Fragment:
        """Elements [start, stop) of this fragment, still a live view."""
        return Fragment(self.kind, self.name, self.region.part(start, stop), self.value[start:stop])


def intersect(source: Region, target: Region) -> Pieces:
    """The elements that two regions of one tensor share. Raises ValueError for regions of different shapes."""
    if source.shape != target.shape:
        raise ValueError(f"regions of different tensors: {list(source.shape)} and {list(target.shape)}")
    (source_first, source_last), (target_first, target_last) = source.span, target.span
    if source_last <= target_first or target_last <= source_first:
        empty = np.zeros(0, dtype=np.int64)
        return Pieces(empty, empty, empty)
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
    return Pieces(end - begin, a.local[i] + (begin - a.start[i]), b.local[j] + (begin - b.start[j]))


@torch.no_grad()
def copy_pieces(source: torch.Tensor, target: torch.Tensor, pieces: Pieces) -> int:
    """target[pieces.target] = source[pieces.source], for 1-D tensors; returns the number of elements copied.

    Pieces of one length at one stride (all the inner rows of a divided matrix) are one strided copy, so the Python cost is
    that of a few copies per pair of regions, not one per row.
    """
    count = len(pieces.length)
    if count == 0:
        return 0
    # A group is broken where the length or a stride differs from the piece before; a piece after a break may start a group
    # of its own, which costs one more copy and nothing else.
    same = np.ones(count, dtype=bool)
    same[0] = False
    same[1:] &= pieces.length[1:] == pieces.length[:-1]
    for offsets in (pieces.source, pieces.target):
        stride = np.diff(offsets)
        same[2:] &= stride[1:] == stride[:-1]
    bounds = [*np.flatnonzero(~same).tolist(), count]
    for first, last in itertools.pairwise(bounds):
        rows, length = last - first, int(pieces.length[first])
        strided = []
        for tensor, offsets in ((source, pieces.source), (target, pieces.target)):
            apart = int(offsets[first + 1] - offsets[first]) if rows > 1 else length
            begin, unit = int(offsets[first]), tensor.stride(0)
            strided.append(tensor.as_strided((rows, length), (apart * unit, unit), tensor.storage_offset() + begin * unit))
        strided[1].copy_(strided[0])
    return int(pieces.length.sum())


def copy(source: torch.Tensor, source_region: Region, target: torch.Tensor, target_region: Region) -> int:
    """Copy what `source` and `target` (1-D, in the order of their regions) share of one tensor; returns the number of elements."""
    return copy_pieces(source, target, intersect(source_region, target_region))


def share(fragments: Sequence[Fragment], index: int, count: int) -> list[Fragment]:
    """The `index`-th of `count` equal shares of fragments that `count` ranks all hold (replicas).

    The fragments are laid end to end in one fixed order and cut into `count` stretches whose sizes differ by at most one
    element; the shares are disjoint, cover everything, and depend on nothing but the regions. Views, no copies.
    """
    if not 0 <= index < count:
        raise ValueError(f"share {index} of {count} does not exist")
    total = sum(fragment.region.numel for fragment in fragments)
    first, last = total * index // count, total * (index + 1) // count
    shares, position = [], 0
    for fragment in sorted(fragments, key=lambda fragment: fragment.order):
        numel = fragment.region.numel
        start, stop = max(first - position, 0), min(last - position, numel)
        if start < stop:
            shares.append(fragment if stop - start == numel else fragment.part(start, stop))
        position += numel
    return shares


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
