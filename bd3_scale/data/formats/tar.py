"""Rows in tar shards, written by webdataset's TarWriter: ROWS_PER_MEMBER rows in each member, as one .npy array.

Packed members are what makes tar fast (one file a row writes 20 times and reads 10 times slower) and any webdataset pipeline can
read the folder. The index says where the content of each member stands, which gives random access and with it the same global
order as MDS. tar has no checksum over content: the manifest's xxh64 of the whole file is what protects it. Invariant: a shard
opened here holds arrays of exactly the type and shape that its index says, and nothing was unpickled.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bd3_scale.data.checked_once import Checked
from bd3_scale.data.formats.checked_rows import CheckedRows, PlainRows, checksums
from bd3_scale.data.formats.mds import ROWS_PER_MEMBER, rows_per_shard, xxh64
from bd3_scale.data.manifest import PREPARE_AGAIN, FileEntry, Manifest, Split, check_plain_name
from bd3_scale.errors import DataError


@dataclass(frozen=True)
class Members:
    """A run of `count` alike arrays in a shard: `bytes` of .npy content with `rows` rows each, from byte `offset` on, `stride` bytes apart.

    A run, because the index of a large data set would else be a hundred times as long: all members but the very last are alike.
    """

    offset: int
    bytes: int
    rows: int
    count: int = 1
    stride: int = 0

    @property
    def possible(self) -> bool:
        """Whether these are sizes."""
        return all(type(size) is int and size >= 0 for size in vars(self).values()) and self.rows > 0

    def offsets(self) -> list[int]:
        """The first byte of each array."""
        return [self.offset + number * self.stride for number in range(self.count)]


class TarRows:
    """Writes rows into tar shards of about `shard_bytes` in an existing, empty `folder`."""

    def __init__(self, folder: Path, context: int, dtype: str, shard_bytes: int, number: int = 0) -> None:
        """`number`: of the first shard."""
        self._folder, self._number = folder, number
        self._shard_rows = rows_per_shard(context * np.dtype(dtype).itemsize, shard_bytes)
        self._waiting: list[np.ndarray] = []
        self._waiting_rows = 0
        self._shards: list[FileEntry] = []
        self._members: list[dict[str, Any]] = []

    def write(self, rows: np.ndarray) -> None:
        """Append `rows`, [n, L] of the dtype."""
        self._waiting.append(rows)
        self._waiting_rows += len(rows)
        if self._waiting_rows >= self._shard_rows:
            ready = np.concatenate(self._waiting)
            whole = len(ready) // self._shard_rows * self._shard_rows
            for start in range(0, whole, self._shard_rows):
                self._write_shard(ready[start : start + self._shard_rows])
            self._waiting, self._waiting_rows = [ready[whole:]], len(ready) - whole

    def finish(self) -> tuple[FileEntry, tuple[FileEntry, ...]]:
        """Write the last shard and the index; their entries for the manifest."""
        if self._waiting_rows:
            self._write_shard(np.concatenate(self._waiting))
        content = json.dumps({"shards": self._members}, indent=1, sort_keys=True).encode()
        (self._folder / "index.json").write_bytes(content)
        return FileEntry("index.json", len(content), 0, xxh64(content)), tuple(self._shards)

    def abort(self) -> None:
        """Give up without an index."""
        self._waiting.clear()

    def _write_shard(self, rows: np.ndarray) -> None:
        from webdataset.writer import TarWriter  # type: ignore[import-untyped,unused-ignore]

        number = self._number + len(self._shards)
        path = self._folder / f"shard-{number:06d}.tar"
        with TarWriter(str(path), encoder=False, compress=False, mtime=0) as writer:
            for first in range(0, len(rows), ROWS_PER_MEMBER):
                array = io.BytesIO()
                np.save(array, rows[first : first + ROWS_PER_MEMBER], allow_pickle=False)
                writer.write({"__key__": f"{number:06d}-{first:09d}", "npy": array.getvalue()})
        with tarfile.open(path) as archive:
            infos = archive.getmembers()
        whole, rest = divmod(len(rows), ROWS_PER_MEMBER)
        runs = []
        if whole:
            stride = infos[1].offset_data - infos[0].offset_data if whole > 1 else 0
            runs.append(Members(infos[0].offset_data, infos[0].size, ROWS_PER_MEMBER, whole, stride))
        if rest:
            runs.append(Members(infos[-1].offset_data, infos[-1].size, rest))
        if [offset for run in runs for offset in run.offsets()] != [info.offset_data for info in infos]:
            raise DataError(f"{path}: its members do not follow each other evenly; use the webdataset of pyproject.toml")
        content = path.read_bytes()
        self._shards.append(FileEntry(path.name, len(content), len(rows), xxh64(content)))
        self._members.append({"file": path.name, "members": [asdict(run) for run in runs]})


class TarIndex:
    """The index of one split, checked against the manifest; opens its shards."""

    def __init__(self, content: bytes, folder: Path, manifest: Manifest, split: Split) -> None:
        path = folder / split.index.file
        self._folder, self._context, self._dtype = folder, manifest.context, np.dtype(manifest.dtype)
        try:
            shards = json.loads(content)["shards"]
            self._files = [check_plain_name(shard["file"], path) for shard in shards]
            self._members = [[Members(**run) for run in shard["members"]] for shard in shards]
            if not all(run.possible for runs in self._members for run in runs):
                raise ValueError
            found = [(file, sum(run.rows * run.count for run in runs)) for file, runs in zip(self._files, self._members, strict=True)]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: is not an index of tar shards; delete the folder and prepare it again") from None
        if found != [(shard.file, shard.rows) for shard in split.shards]:
            raise DataError(f"{path}: does not describe the shards that the manifest names; delete the folder and prepare it again")

    def check(self, shard: int, content: bytes) -> Checked:
        """The rows in the content of a shard, whose hash is right: np.load decodes it once, and checks every member. Raises DataError."""
        path, row_bytes, offsets = self._folder / self._files[shard], self._context * self._dtype.itemsize, list[int]()
        for run, offset in [(one, offset) for one in self._members[shard] for offset in one.offsets()]:
            try:
                array = np.load(io.BytesIO(content[offset : offset + run.bytes]), allow_pickle=False)
            except (ValueError, EOFError, OSError):
                raise DataError(f"{path}: holds no array at byte {offset}; delete the folder and prepare it again") from None
            if array.shape != (run.rows, self._context) or array.dtype != self._dtype or not array.flags.c_contiguous:
                found, needed = f"{array.dtype}{list(array.shape)}", f"{self._dtype}{[run.rows, self._context]}"
                raise DataError(f"{path}: holds {found} at byte {offset}, needed is {needed}; {PREPARE_AGAIN}")
            start = offset + run.bytes - array.nbytes
            offsets += range(start, start + array.nbytes, row_bytes)
        return checksums(content, offsets, row_bytes)

    def open(self, shard: int, descriptor: int, checked: Checked) -> PlainRows:
        """The shard over an open file, which stays the caller's, and what its check gave."""
        path, row_bytes = self._folder / self._files[shard], self._context * self._dtype.itemsize
        return PlainRows(CheckedRows(path, descriptor, checked, row_bytes), self._dtype)
