"""What a rank holds of the training state, and how its elements get from any layout into any other (regions: region.py).

Invariants: a fragment is a live view of the engine's state, in the order of its region; nothing here knows about files, ranks or
process groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bd3_scale.checkpoint.region import KIND, CopyPlan, Region, kind_order


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
        if KIND.fullmatch(self.kind) is None:
            raise ValueError(f"fragment of {self.name}: kind {self.kind!r} is not a word of small letters")
        if self.value.dtype != torch.float32 or self.value.shape != (self.region.numel,):
            raise ValueError(
                f"fragment {self.kind} of {self.name} must be fp32 of shape ({self.region.numel},), "
                f"not {self.value.dtype} of {tuple(self.value.shape)}"
            )

    @property
    def order(self) -> tuple[tuple[int, str], str, int, int, int, int, int]:
        """Sorting key: the one order in which fragments are shared and written, whatever the caller's."""
        region = self.region
        return kind_order(self.kind), self.name, region.span[0], region.dim, region.offset, region.size, region.start

    def part(self, start: int, stop: int) -> Fragment:
        """Elements [start, stop) of this fragment, still a live view."""
        return Fragment(self.kind, self.name, self.region.part(start, stop), self.value[start:stop])


@torch.no_grad()
def copy_pieces(source: torch.Tensor, target: torch.Tensor, pieces: CopyPlan) -> int:
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
