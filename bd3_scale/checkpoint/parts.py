"""The parts of a tensor as columns of numbers: a thousand ranks' parts of a thousand tensors without a million objects.

In index.json a column is written as progressions [first, step, count], so that an even division over any number of ranks is a few
numbers; tensors that are divided alike share one `Parts`, in the file and in memory. Columns are made when they are first looked at.
Invariants: columns are equally long, and every row is a `Region` of the shape inside a file of the checkpoint, or it is a
CheckpointError; whoever asks for a region is handed only the parts that meet it.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bd3_scale.checkpoint.region import Region, tiling_fault
from bd3_scale.errors import CheckpointError

if TYPE_CHECKING:
    from bd3_scale.checkpoint.fragments import Fragment

COLUMNS = ("file", "dim", "offset", "size", "start", "stop")
"""`file`: number of the writer; the others as in `Region`."""
LARGEST = 1 << 62

Runs = list[list[list[int]]]
"""Of each column, its progressions."""


def state_name(writer: int, writers: int) -> str:
    """File name of the `writer`-th of `writers` ranks that write."""
    return f"state-{writer:05d}-of-{writers:05d}.safetensors"


@dataclass(frozen=True)
class Part:
    """A region of a tensor and the file that holds its elements, as a 1-D fp32 tensor named by `part_key`."""

    file: str
    region: Region


class Parts(Sequence[Part]):
    """The parts of the tensors of one shape that are divided alike, sorted by slice, then by their elements in it."""

    def __init__(self, shape: Sequence[int], writers: int, runs: Runs) -> None:
        """Raises CheckpointError for what no `encode` gives; whether rows are regions is known when they are looked at."""
        self.shape, self.writers, self.runs = tuple(shape), writers, runs
        need(isinstance(runs, list) and len(runs) == len(COLUMNS), "parts have other columns")
        counts = set()
        for column in runs:
            need(isinstance(column, list) and bool(column), "a column is empty")
            for run in column:
                numbers = isinstance(run, list) and len(run) == 3 and all(type(number) is int for number in run)
                need(numbers, "a progression has no 3 numbers")
                first, step, count = run
                need(count > 0 and 0 <= first <= LARGEST and 0 <= first + step * (count - 1) <= LARGEST, f"progression {run} is impossible")
            counts.add(sum(count for _, _, count in column))
        need(len(counts) == 1, "the columns of parts differ in length")
        self._count = counts.pop()
        need(all(type(extent) is int and extent > 0 for extent in self.shape), f"shape {list(self.shape)} is impossible")
        need(self._count <= math.prod(self.shape) <= LARGEST, f"{self._count} parts of shape {list(self.shape)} are impossible")

    def __len__(self) -> int:
        return self._count

    @cached_property
    def table(self) -> np.ndarray:
        """int64 [parts, 6]: the columns."""
        table = np.stack([_expanded(column) for column in self.runs], axis=1)
        file, dim, offset, size, start, stop = table.T
        extents = np.array(self.shape or (1,), np.int64)
        need(bool((dim < len(extents)).all()), "a part has a dim that the tensor has not")
        outer, inner = (np.array([math.prod(side) for side in sides], np.int64) for sides in _sides(self.shape or (1,)))
        whole = size <= extents[dim] - offset
        inside = (size > 0) & whole & (start < stop)
        need(bool((inside & (file < self.writers)).all()), "a part does not lie in the tensor, or in no file")
        need(bool((stop <= outer[dim] * size * inner[dim]).all()), "a part is longer than its slice")
        return table

    @cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last + 1 element of the flattened full tensor of each part."""
        _, dim, offset, size, start, stop = self.table.T
        extents = np.array(self.shape or (1,), np.int64)
        inner = np.array([math.prod(side) for side in _sides(self.shape or (1,))[1]], np.int64)[dim]

        def full(element: np.ndarray) -> np.ndarray:
            row, rest = np.divmod(element, size * inner)
            return (row * extents[dim] + offset) * inner + rest

        return full(start), full(stop - 1) + 1

    @cached_property
    def _of_file(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for row, file in enumerate(self.table[:, 0].tolist()):
            found.setdefault(state_name(file, self.writers), []).append(row)
        return found

    def _part(self, row: int) -> Part:
        file, *numbers = self.table[row].tolist()
        return Part(state_name(file, self.writers), Region(self.shape, *numbers))

    def __getitem__(self, row: Any) -> Any:
        return self._part(range(self._count)[row])

    def __iter__(self) -> Iterator[Part]:
        return map(self._part, range(self._count))

    def meeting(self, region: Region) -> list[Part]:
        """Those that may share elements with `region`, as far as their first and last elements tell."""
        first, last = region.span
        begins, ends = self._spans
        return [self._part(row) for row in np.flatnonzero((begins < last) & (ends > first)).tolist()]

    def in_file(self, file: str) -> list[Region]:
        """The regions that one file holds."""
        return [self._part(row).region for row in self._of_file.get(file, [])]

    @property
    def files(self) -> set[str]:
        return set(self._of_file)

    def fault(self) -> str | None:
        """None where the parts cover every element exactly once; otherwise what is wrong, in words."""
        (dim, offset, size), start, stop = self.table[0, 1:4].tolist(), self.table[:, 4], self.table[:, 5]
        flat = (self.table[:, 1:4] == self.table[0, 1:4]).all() and (offset, size) == (0, (self.shape or (1,))[dim])
        if flat and start[0] == 0 and stop[-1] == math.prod(self.shape) and (start[1:] == stop[:-1]).all():
            return None  # no slices: a thousand shares of ZeRO are seen to be whole at once
        return tiling_fault(self.shape, [part.region for part in self])


def _sides(shape: Sequence[int]) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    return [shape[:dim] for dim in range(len(shape))], [shape[dim + 1 :] for dim in range(len(shape))]


def encode(table: np.ndarray) -> Runs:
    """The columns of int64 [parts, 6] as progressions, after the rows were sorted."""
    return [_progressions(column) for column in table.T]


def sort(table: np.ndarray) -> np.ndarray:
    """Rows by slice, then by element: the one order in which parts are written."""
    return table[np.lexsort(table.T[[0, 5, 4, 3, 2, 1]])]


def _progressions(values: np.ndarray) -> list[list[int]]:
    steps = np.diff(values)
    changes = [*(np.flatnonzero(steps[1:] != steps[:-1]) + 1).tolist(), len(steps)]
    runs, at, change = [], 0, 0
    while at < len(values):
        while change < len(changes) - 1 and changes[change] <= at:
            change += 1
        last = max(changes[change], at) if at < len(steps) else at
        runs.append([int(values[at]), int(steps[at]) if last > at else 0, last - at + 1])
        at = last + 1
    return runs


def _expanded(column: list[list[int]]) -> np.ndarray:
    return np.concatenate([first + step * np.arange(count, dtype=np.int64) for first, step, count in column])


def pack(fragments: Sequence[Fragment]) -> tuple[bytes, bytes]:
    """What one rank writes, for `unpack`: (kind, name, shape) of each fragment, and its region; alike on most ranks, and compressed."""
    names = json.dumps([[one.kind, one.name, one.region.shape] for one in fragments]).encode()
    regions = [one.region for one in fragments]
    table = np.array([[one.dim, one.offset, one.size, one.start, one.stop] for one in regions], np.int64)
    return zlib.compress(names, 1), zlib.compress(table.tobytes(), 1)


def unpack(packed: Mapping[int, tuple[bytes, bytes]]) -> dict[tuple[str, str], dict[tuple[int, ...], np.ndarray]]:
    """(kind, name) -> shape -> the sorted table of its parts, from what each writer has packed; one object for tensors divided alike."""
    alike: dict[bytes, list[int]] = {}
    for writer, (names, _) in sorted(packed.items()):
        alike.setdefault(names, []).append(writer)
    pieces: dict[tuple[int, bytes], np.ndarray] = {}
    found: dict[tuple[str, str], dict[tuple[int, ...], list[tuple[int, bytes]]]] = {}
    for group, (names, writers) in enumerate(alike.items()):
        entries, files = json.loads(zlib.decompress(names)), np.array(writers, np.int64)[:, None]
        stacked = np.empty((len(entries), len(writers), 5), np.int64)
        for place, writer in enumerate(writers):
            stacked[:, place] = np.frombuffer(zlib.decompress(packed[writer][1]), np.int64).reshape(-1, 5)
        for (kind, name, shape), rows in zip(entries, stacked, strict=True):
            key = group, hashlib.sha256(rows).digest()  # of what is large the interpreter is free meanwhile, for whoever launches
            if key not in pieces:
                pieces[key] = np.hstack([files, rows])
            found.setdefault((kind, name), {}).setdefault(tuple(shape), []).append(key)
    tables: dict[tuple[tuple[int, bytes], ...], np.ndarray] = {}

    def table(keys: tuple[tuple[int, bytes], ...]) -> np.ndarray:
        if keys not in tables:
            tables[keys] = sort(np.concatenate([pieces[key] for key in keys]))
        return tables[keys]

    return {key: {shape: table(tuple(keys)) for shape, keys in shapes.items()} for key, shapes in found.items()}


def need(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)
