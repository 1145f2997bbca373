"""Whole matrices for an optimizer that needs them: each goes to one rank, its owner, and what that makes of it goes back.

The ranks of a group together hold each matrix once, in any division (rows, columns, flat stretches of ZeRO). The owner is the rank that
holds most of it, so that the fewest elements move: twice those that the others hold. Ranks that hold about as much take turns, by the
work they have so far. To gather every matrix on every rank instead would send n (k - 1) / k elements of n over k ranks from each, and
every rank would do all the work; from owners to ranks and back it is 2 n (k - 1) / k^2. A matrix that one rank holds whole (ZeRO 0, one
process, most matrices of a flat division) never moves; copies of it on other ranks do the same work, because that moves least.

Invariants: who owns what follows from the places of all ranks alone, and every rank finds the same; all ranks of the group make the same
collectives in the same order; at most `ROUND` elements for each rank are under way at a time, or one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_scale.checkpoint.fragments import copy_pieces
from bd3_scale.checkpoint.region import CopyPlan, Region, intersect

ROUND = 1 << 25
"""Elements for each rank of the group that are exchanged at a time."""

Key = tuple[str, int]
"""Name of a matrix, and which of the group's copies of it."""


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a matrix."""

    key: Key
    region: Region

    @property
    def pieces(self) -> CopyPlan:
        """Where its elements lie in the whole matrix."""
        return intersect(self.region, Region.whole(self.region.shape))


@dataclass
class Round:
    """One exchange. `sent`, `received`: elements to and from each rank."""

    sent: list[int]
    received: list[int]
    away: list[int] = field(default_factory=list)
    """Of this rank's pieces, those that others own, in the order in which they are sent."""
    owned: dict[Key, list[tuple[int | None, Region, int]]] = field(default_factory=dict)
    """Of each matrix, all pieces: this rank's own by number, or None and its place in what is received."""


class MatrixOwners:
    """`held`: this rank's pieces, in its order; `group`: the ranks that together hold every matrix once, None for this one alone.
    A matrix is exchanged as `dtype`. Collective."""

    def __init__(self, held: Sequence[Piece], group: dist.ProcessGroup | None, dtype: torch.dtype, device: torch.device) -> None:
        self.held, self.group, self.dtype, self.device = list(held), group, dtype, device
        every: list[list[Piece]] = [self.held]
        rank = 0
        if group is not None and dist.get_world_size(group) > 1:
            every = [[]] * dist.get_world_size(group)
            dist.all_gather_object(every, self.held, group=group)
            rank = dist.get_rank(group)
        owners = owners_of(every)
        self.alone = [number for number, piece in enumerate(self.held) if piece.region.numel == piece.region.full_numel]
        """Of this rank's pieces, those that are whole matrices."""
        self.rounds = _rounds(every, owners, rank)
        self._pieces = {region: Piece(key, region).pieces for one in self.rounds for key, all in one.owned.items() for _, region, _ in all}

    def apply(self, values: Sequence[Tensor], function: Callable[[str, Tensor], Tensor], result: Callable[[int, Tensor], None]) -> None:
        """Hand each matrix, made up of the `values` of all ranks' pieces (1-D, in the order of `held`), to `function` (name, [rows,
        columns] of `dtype`) on one rank, and what it returns, of the same shape, to `result` (number of a piece, 1-D) where the pieces
        are. Collective."""
        for number in self.alone:
            piece = self.held[number]
            result(number, function(piece.key[0], values[number].to(self.dtype).view(piece.region.shape)).reshape(-1))
        for one in self.rounds:
            self._exchange(one, values, function, result)

    def _exchange(
        self, one: Round, values: Sequence[Tensor], function: Callable[[str, Tensor], Tensor], result: Callable[[int, Tensor], None]
    ) -> None:
        here, away = (torch.empty(sum(counts), dtype=self.dtype, device=self.device) for counts in (one.received, one.sent))
        parts_away = away.split([self.held[number].region.numel for number in one.away])
        for number, part in zip(one.away, parts_away, strict=True):
            part.copy_(values[number])
        dist.all_to_all_single(here, away, one.received, one.sent, group=self.group)
        for (name, _), parts in one.owned.items():
            shape = parts[0][1].shape
            whole = here.new_empty(math.prod(shape))
            for own, region, start in parts:
                source = here[start : start + region.numel] if own is None else values[own]
                copy_pieces(source, whole, self._pieces[region])
            made = function(name, whole.view(shape)).reshape(-1)
            for own, region, start in parts:
                target = here[start : start + region.numel] if own is None else here.new_empty(region.numel)
                there = self._pieces[region]
                copy_pieces(made, target, CopyPlan(there.length, there.target, there.source))
                if own is not None:
                    result(own, target)
        dist.all_to_all_single(away, here, one.sent, one.received, group=self.group)
        for number, part in zip(one.away, parts_away, strict=True):
            result(number, part)


def owners_of(every: Sequence[Sequence[Piece]]) -> dict[Key, int]:
    """The owner of each matrix, from the pieces of each rank; largest matrices first."""
    held: dict[Key, dict[int, int]] = {}
    shapes: dict[Key, tuple[int, ...]] = {}
    for rank, pieces in enumerate(every):
        for piece in pieces:
            counts = held.setdefault(piece.key, {})
            counts[rank] = counts.get(rank, 0) + piece.region.numel
            shapes[piece.key] = piece.region.shape
    work = [0] * len(every)
    owners = {}
    for key in sorted(held, key=lambda key: (-math.prod(shapes[key]), key)):
        most = max(held[key].values())
        # A rank whose share is smaller by the rounding of a division takes its turn, too.
        candidates = [rank for rank, count in held[key].items() if 8 * count >= 7 * most]
        owners[key] = min(candidates, key=lambda rank: (work[rank], rank))
        work[owners[key]] += math.prod(shapes[key]) * min(shapes[key])
    return owners


def _rounds(every: Sequence[Sequence[Piece]], owners: dict[Key, int], rank: int) -> list[Round]:
    """What rank `rank` does in each exchange; of matrices that a rank holds whole there is none."""
    holders: dict[Key, list[tuple[int, int, Region]]] = {}
    for holder, pieces in enumerate(every):
        for number, piece in enumerate(pieces):
            if piece.region.numel < piece.region.full_numel:
                holders.setdefault(piece.key, []).append((holder, number, piece.region))
    rounds: list[list[Key]] = []
    elements = 0
    for key in sorted(holders):
        size = holders[key][0][2].full_numel
        if not rounds or elements + size > ROUND * len(every):
            rounds.append([])
            elements = 0
        rounds[-1].append(key)
        elements += size
    return [_round({key: holders[key] for key in keys}, owners, rank, len(every)) for keys in rounds]


def _round(holders: dict[Key, list[tuple[int, int, Region]]], owners: dict[Key, int], rank: int, ranks: int) -> Round:
    sent, received = [0] * ranks, [0] * ranks
    away: list[tuple[int, int]] = []
    coming: list[tuple[int, Key, Region]] = []
    one = Round(sent, received)
    for key, pieces in holders.items():
        owner = owners[key]
        for holder, number, region in pieces:
            if holder == rank and owner != rank:
                sent[owner] += region.numel
                away.append((owner, number))
            elif owner == rank and holder == rank:
                one.owned.setdefault(key, []).append((number, region, 0))
            elif owner == rank:
                received[holder] += region.numel
                coming.append((holder, key, region))
    one.away = [number for _, number in sorted(away, key=lambda pair: pair[0])]  # stable: in the order of keys for each owner
    start = 0
    for _, key, region in sorted(coming, key=lambda triple: triple[0]):
        one.owned.setdefault(key, []).append((None, region, start))
        start += region.numel
    return one
