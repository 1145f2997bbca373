"""Second half of preparing a corpus: which tokens of the chunks (tokenization.py) each shard holds, and writing one shard.

Which tokens a row holds follows from the lengths of the documents alone, so that every shard can be written by itself, in any process.
Invariants: a shard's file and its entry are a function of the corpus and the options; the entry (journal.py) is written when the file is
whole, and a shard is kept only where its file still has the size and the hash of its entry.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bd3_scale.data import journal
from bd3_scale.data.counted import counted, uncounted
from bd3_scale.data.formats.mds import MDSRows, rows_per_shard, xxh64
from bd3_scale.data.formats.tar import TarRows
from bd3_scale.data.manifest import SPLITS, FileEntry
from bd3_scale.data.preparation.best_fit import best_fit
from bd3_scale.data.preparation.packing import Packer
from bd3_scale.data.preparation.prepare import Packing
from bd3_scale.data.preparation.tokenization import Chunk, chunk_path, read_chunk, read_ends
from bd3_scale.errors import DataError

WHOLE_SHARD = (1 << 31) - 1


@dataclass(frozen=True)
class Entry:
    """What is known of a shard that is written."""

    file: FileEntry
    index: dict[str, Any]
    """What its index says of it."""
    counts: list[int]
    """How many tokens of each row count; [] where all do."""
    filling: int
    """Positions that hold filling."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of a split lie in the chunks, in order; int64 arrays of equal length. A long one lies there in parts."""

    chunk: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    last: np.ndarray
    """bool: whether it is the last part of a document, or a whole one."""

    @property
    def count(self) -> int:
        """How many documents."""
        return int(self.last.sum())

    @property
    def lengths(self) -> np.ndarray:
        return self.stop - self.start

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where each document ends in the split's stream."""
        return np.cumsum(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def range(self, first: int, last: int) -> np.ndarray:
        """Tokens [first, last) of the split's stream, as int64 [n, 3]: chunk, start, stop. Neighbours in a chunk are one piece."""
        low, high = np.searchsorted(self._ends, first, "right"), np.searchsorted(self._ends, last, "left") + 1
        chunk, begin, ends = self.chunk[low:high], self.start[low:high], self._ends[low:high]
        before = ends - (self.stop[low:high] - begin)
        start, stop = begin + np.maximum(first - before, 0), begin + np.minimum(last, ends) - before
        begins = np.concatenate([[True], (chunk[1:] != chunk[:-1]) | (start[1:] != stop[:-1])])
        return np.stack([chunk[begins], start[begins], stop[np.append(begins[1:], True)]], axis=1)

    def rows(self, kind: str, payload: int) -> np.ndarray:
        """What each row of `document` or `best_fit` holds, in the order of the rows: int64 [n, 4]: row, chunk, start, stop. Documents lie
        in the chunks whole."""
        if kind == "document":
            return np.stack([np.arange(len(self.chunk)), self.chunk, self.start, np.minimum(self.stop, self.start + payload)], axis=1)
        row, document, first, last = best_fit(self.lengths, payload).T
        return np.stack([row, self.chunk[document], self.start[document] + first, self.start[document] + last], axis=1)


@dataclass(frozen=True)
class Plan:
    """Which tokens of a split its rows hold."""

    documents: Documents
    rows: int
    kept: int
    """Tokens of the documents that are in some row."""
    placed: np.ndarray | None
    """`Documents.rows`; None: of the stream, one after another."""

    @classmethod
    def of(cls, documents: Documents, packing: Packing, payload: int) -> Plan:
        if packing.kind == "wrap":
            rows = documents.tokens // payload
            return cls(documents, rows, rows * payload, None)
        placed = documents.rows(packing.kind, payload)
        return cls(documents, int(placed[:, 0].max(initial=-1)) + 1, int((placed[:, 3] - placed[:, 2]).sum()), placed)

    def pieces(self, first: int, last: int, payload: int) -> np.ndarray:
        """Of rows [first, last): int64 [n, 4], as `Documents.rows`, counted from row `first`."""
        if self.placed is None:
            pieces = self.documents.range(first * payload, last * payload)
            return np.concatenate([np.zeros((len(pieces), 1), np.int64), pieces], axis=1)
        begin, end = np.searchsorted(self.placed[:, 0], [first, last])
        return self.placed[begin:end] - np.array([first, 0, 0, 0])


def split_documents(folder: Path, chunks: int, budget: int | None, last: int | None, held_apart: bool) -> tuple[dict[str, Documents], int]:
    """The documents of each split, of the first `chunks` chunks in `folder`; how many documents these chunks hold.

    `budget`: the documents up to so many tokens (those held out as files of their own are not counted, `held_apart`); `last`: so many of
    them at the end are held out.
    """
    if not chunks:
        none = np.zeros(0, np.int64)
        return {name: Documents(none, none, none, none.astype(bool)) for name in SPLITS}, 0
    ends, flags, closed = zip(*(read_ends(chunk_path(folder, number)) for number in range(chunks)), strict=True)
    chunk = np.repeat(np.arange(chunks), [len(part) for part in ends])
    start = np.concatenate([np.concatenate([[0], part[:-1]]) for part in ends])
    stop, held, whole = np.concatenate(ends), np.concatenate(flags), np.concatenate(closed)
    document = np.cumsum(whole) - whole  # which one a part belongs to; the last may go on in a chunk that is not there
    count = int(whole.sum())
    kept = document < count
    if budget is not None:
        counted = (stop - start) * ~held if held_apart else stop - start
        within = np.append(np.cumsum(counted)[whole] <= budget, False)[document]
        kept &= within | held if held_apart else within
    if last is not None:
        held = document >= document[kept].max(initial=-1) + 1 - last
    sides = (("train", kept & ~held), ("validation", kept & held))
    return {name: Documents(chunk[side], start[side], stop[side], whole[side]) for name, side in sides}, count


@dataclass(frozen=True)
class ShardJob:
    """A shard to be written: the stream of all pieces, cut into rows (packing `wrap`), or rows of the pieces of each, filled up."""

    scratch: Path
    split: str
    number: int
    pieces: np.ndarray
    """int64 [n, 4]: row of the shard (not of `wrap`), chunk, start, stop."""
    packing: str
    format: str
    packer: Packer

    @property
    def folder(self) -> Path:
        return self.scratch / "data" / self.split

    @property
    def entry(self) -> Path:
        return self.scratch / "entries" / f"{self.split}-{self.number:06d}.json"


def shard_jobs(scratch: Path, packing: Packing, packer: Packer, splits: dict[str, Plan]) -> Iterator[ShardJob]:
    """Every shard of `splits`, in order."""
    per_shard = rows_per_shard(packing.context * packer.dtype.itemsize, packing.shard_bytes)
    for name, plan in splits.items():
        for number, first in enumerate(range(0, plan.rows, per_shard)):
            pieces = plan.pieces(first, min(first + per_shard, plan.rows), packer.payload)
            yield ShardJob(scratch, name, number, pieces, packing.kind, packing.format, packer)


def write_shard(job: ShardJob) -> Entry:
    """Write one shard, unless it is there and whole."""
    saved = journal.read(job.entry)
    if saved is not None:
        entry = Entry(**{**saved, "file": FileEntry(**saved["file"])})
        path = job.folder / entry.file.file
        if path.exists() and path.stat().st_size == entry.file.bytes and xxh64(path.read_bytes()) == entry.file.xxh64:
            return entry
    packer = job.packer
    payloads, filling = _payloads(job, packer)
    rows = packer.rows_of(payloads)
    temporary = job.scratch / "temporary" / f"{job.split}-{job.number:06d}-{os.getpid()}"
    temporary.mkdir()
    writer: MDSRows | TarRows
    if job.format == "mds":
        writer = MDSRows(temporary, packer.context, packer.dtype.name, WHOLE_SHARD)
    else:
        writer = TarRows(temporary, packer.context, packer.dtype.name, WHOLE_SHARD, number=job.number)
    writer.write(rows)
    _, (written,) = writer.finish()
    (index,) = json.loads((temporary / "index.json").read_bytes())["shards"]
    file = written
    if job.format == "mds":
        file = replace(written, file=f"shard.{job.number:05d}.mds")
        index["raw_data"]["basename"] = file.file
    os.replace(temporary / written.file, job.folder / file.file)
    shutil.rmtree(temporary)
    entry = Entry(file, index, counted(rows).sum(1).tolist() if packer.dtype.kind == "i" else [], filling)
    journal.write(job.entry, asdict(entry))
    return entry


def _payloads(job: ShardJob, packer: Packer) -> tuple[np.ndarray, int]:
    """[rows, payload] of the job's tokens, and how many positions of that are filling."""
    tokens = job.scratch / "tokens"
    pieces = [_chunk(tokens, chunk).tokens[start:stop] for _, chunk, start, stop in job.pieces.tolist()]
    if job.packing == "wrap":
        return np.concatenate(pieces).reshape(-1, packer.payload), 0
    rows = job.pieces[:, 0].tolist()
    payloads = np.full((rows[-1] + 1, packer.payload), uncounted(packer.dtype.type(packer.end_of_text)), packer.dtype)
    used = [0] * len(payloads)
    for row, piece in zip(rows, pieces, strict=True):
        payloads[row, used[row] : used[row] + len(piece)] = piece
        used[row] += len(piece)
    return payloads, payloads.size - sum(used)


@lru_cache(maxsize=16)
def _chunk(folder: Path, number: int) -> Chunk:
    chunk = read_chunk(chunk_path(folder, number))
    if chunk is None:
        raise DataError(f"{chunk_path(folder, number)}: is damaged; give the same command again, which makes it anew")
    return chunk


def index_bytes(format: str, shards: list[dict[str, Any]]) -> bytes:
    """index.json as streaming, or TarRows, writes it."""
    if format == "mds":
        return json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()
    return json.dumps({"shards": shards}, indent=1, sort_keys=True).encode()
