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
from bd3_scale.data.formats.mds import MDSRows, rows_per_shard, xxh64
from bd3_scale.data.formats.tar import TarRows
from bd3_scale.data.manifest import SPLITS, FileEntry
from bd3_scale.data.preparation.packing import Packer
from bd3_scale.data.preparation.prepare import Packing
from bd3_scale.data.preparation.tokenization import Chunk, chunk_path, read_chunk, read_ends
from bd3_scale.errors import DataError

WHOLE_SHARD = (1 << 31) - 1
Entry = tuple[FileEntry, dict[str, Any]]
"""A shard's entry of the manifest, and that of the index."""


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

    def each(self, first: int, last: int) -> np.ndarray:
        """Documents [first, last), as int64 [n, 3]: chunk, start, stop."""
        return np.stack([self.chunk[first:last], self.start[first:last], self.stop[first:last]], axis=1)


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
    """A shard to be written: rows of `payload` tokens of `pieces`, in order, or for packing `document` one row of each piece."""

    scratch: Path
    split: str
    number: int
    pieces: np.ndarray
    """int64 [n, 3]: chunk, start, stop."""
    packing: str
    format: str
    context: int
    row_special: str
    end_of_text: int
    vocabulary_size: int

    @property
    def folder(self) -> Path:
        return self.scratch / "data" / self.split

    @property
    def entry(self) -> Path:
        return self.scratch / "entries" / f"{self.split}-{self.number:06d}.json"


def rows_of_split(packing: Packing, packer: Packer, documents: Documents) -> int:
    """Rows that a split fills."""
    return documents.tokens // packer.payload if packing.kind == "wrap" else len(documents.chunk)


def shard_jobs(scratch: Path, packing: Packing, packer: Packer, splits: dict[str, Documents]) -> Iterator[ShardJob]:
    """Every shard of `splits`, in order."""
    tokenizer, per_shard = packing.tokenizer, rows_per_shard(packing.context * packer.dtype.itemsize, packing.shard_bytes)
    how = (packing.kind, packing.format, packing.context, packing.row_special, tokenizer.end_of_text, tokenizer.vocabulary_size)
    for name, documents in splits.items():
        rows = rows_of_split(packing, packer, documents)
        for number, first in enumerate(range(0, rows, per_shard)):
            last = min(first + per_shard, rows)
            wrapped = packing.kind == "wrap"
            pieces = documents.range(first * packer.payload, last * packer.payload) if wrapped else documents.each(first, last)
            yield ShardJob(scratch, name, number, pieces, *how)


def write_shard(job: ShardJob) -> Entry:
    """Write one shard, unless it is there and whole."""
    saved = journal.read(job.entry)
    if saved is not None:
        entry = FileEntry(**saved["file"])
        path = job.folder / entry.file
        if path.exists() and path.stat().st_size == entry.bytes and xxh64(path.read_bytes()) == entry.xxh64:
            return entry, saved["index"]
    packer = Packer(job.context, job.vocabulary_size, job.end_of_text, job.row_special)
    rows = packer.rows_of(_payloads(job, packer))
    temporary = job.scratch / "temporary" / f"{job.split}-{job.number:06d}-{os.getpid()}"
    temporary.mkdir()
    writer: MDSRows | TarRows
    if job.format == "mds":
        writer = MDSRows(temporary, job.context, packer.dtype.name, WHOLE_SHARD)
    else:
        writer = TarRows(temporary, job.context, packer.dtype.name, WHOLE_SHARD, number=job.number)
    writer.write(rows)
    _, (written,) = writer.finish()
    (index,) = json.loads((temporary / "index.json").read_bytes())["shards"]
    entry = written
    if job.format == "mds":
        entry = replace(written, file=f"shard.{job.number:05d}.mds")
        index["raw_data"]["basename"] = entry.file
    os.replace(temporary / written.file, job.folder / entry.file)
    shutil.rmtree(temporary)
    journal.write(job.entry, {"file": asdict(entry), "index": index})
    return entry, index


def _payloads(job: ShardJob, packer: Packer) -> np.ndarray:
    """[rows, payload] of the job's tokens."""
    tokens = job.scratch / "tokens"
    pieces = [_chunk(tokens, chunk).tokens[start:stop] for chunk, start, stop in job.pieces.tolist()]
    if job.packing == "wrap":
        return np.concatenate(pieces).reshape(-1, packer.payload)
    payloads = np.full((len(pieces), packer.payload), job.end_of_text, packer.dtype)
    for row, piece in zip(payloads, pieces, strict=True):
        row[: min(len(piece), packer.payload)] = piece[: packer.payload]
    return payloads


@lru_cache(maxsize=4)
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
