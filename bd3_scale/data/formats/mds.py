"""Rows in MDS shards, written by mosaicml-streaming's writer and decoded by its reader.

One column, `tokens`, of fixed shape (`ndarray:uint16:L` or `ndarray:uint32:L`): any MDS tool can read the folder. What is not
used of streaming is its iteration (StreamingDataset): that ends an epoch early, without an exception, when a shard is bad, and
needs shared memory. Invariant: a shard opened here has the rows, columns and row length that its index and the manifest say;
an index with other columns (pickled objects among them) is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bd3_scale.data.checked_once import Checked
from bd3_scale.data.formats.checked_rows import CheckedRows, checksums
from bd3_scale.data.formats.streaming_compat import import_streaming
from bd3_scale.data.manifest import PREPARE_AGAIN, FileEntry, Manifest, Split, check_plain_name
from bd3_scale.errors import DataError

COLUMN = "tokens"
ROWS_PER_MEMBER = 64
"""Rows in each member of a tar shard; every full shard, of both formats, holds a multiple of it."""


def rows_per_shard(row_bytes: int, shard_bytes: int) -> int:
    """Rows of a full shard of about `shard_bytes`: the same for both formats, so that the global order is the same."""
    member_bytes = 1024 + ROWS_PER_MEMBER * row_bytes  # with the headers of tar and .npy
    return ROWS_PER_MEMBER * max(1, shard_bytes // member_bytes)


def xxh64(data: bytes) -> str:
    """streaming's own xxh64 of `data`, hexadecimal."""
    return import_streaming("streaming.base.hashing").get_hash("xxh64", data)


class MDSRows:
    """Writes rows into MDS shards of about `shard_bytes` in an existing, empty `folder`."""

    def __init__(self, folder: Path, context: int, dtype: str, shard_bytes: int) -> None:
        self._folder = folder
        row_bytes = context * np.dtype(dtype).itemsize
        self._writer = import_streaming().MDSWriter(
            columns={COLUMN: f"ndarray:{dtype}:{context}"}, out=str(folder), hashes=["xxh64"], size_limit=shard_bytes, max_workers=1
        )
        table_entry = self._writer.extra_bytes_per_sample
        self._writer.size_limit = self._writer.extra_bytes_per_shard + rows_per_shard(row_bytes, shard_bytes) * (row_bytes + table_entry)

    def write(self, rows: np.ndarray) -> None:
        """Append `rows`, [n, L] of the dtype."""
        for row in rows:
            self._writer.write({COLUMN: row})

    def finish(self) -> tuple[FileEntry, tuple[FileEntry, ...]]:
        """Write the last shard and the index; their entries for the manifest."""
        self._writer.finish()
        shards = tuple(
            FileEntry(shard["raw_data"]["basename"], shard["raw_data"]["bytes"], shard["samples"], shard["raw_data"]["hashes"]["xxh64"])
            for shard in self._writer.shards
        )
        index = (self._folder / "index.json").read_bytes()
        return FileEntry("index.json", len(index), 0, xxh64(index)), shards

    def abort(self) -> None:
        """Give up without an index; ends streaming's writer threads."""
        self._writer.cancel_future_jobs()


class MDSIndex:
    """The index of one split, checked against the manifest; opens its shards."""

    def __init__(self, content: bytes, folder: Path, manifest: Manifest, split: Split) -> None:
        path = folder / split.index.file
        self._folder, self._context, self._dtype = folder, manifest.context, np.dtype(manifest.dtype)
        try:
            self._shards: list[dict[str, Any]] = json.loads(content)["shards"]
            found = [self._entry(shard, path) for shard in self._shards]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: is not an MDS index; delete the folder and prepare it again") from None
        if tuple(found) != split.shards:
            raise DataError(f"{path}: does not describe the shards that the manifest names; delete the folder and prepare it again")

    def _entry(self, shard: dict[str, Any], path: Path) -> FileEntry:
        raw = shard["raw_data"]
        check_plain_name(raw["basename"], path)
        columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        wanted = {COLUMN: f"ndarray:{self._dtype.name}:{self._context}"}
        if columns != wanted or shard["format"] != "mds" or shard["compression"]:
            raise DataError(f"{path}: {raw['basename']} has the columns {columns}, needed are {wanted}, uncompressed; {PREPARE_AGAIN}")
        return FileEntry(raw["basename"], raw["bytes"], shard["samples"], raw["hashes"]["xxh64"])

    def check(self, shard: int, content: bytes) -> Checked:
        """The rows in the content of a shard, whose hash is right. Raises DataError."""
        described, row_bytes = self._shards[shard], self._context * self._dtype.itemsize
        rows = described["samples"]
        header = np.frombuffer(content[: 4 * (rows + 2)], np.uint32)
        fits = len(header) == rows + 2 and header[0] == rows and header[-1] == len(content)
        if not fits or (np.diff(header[1:].astype(np.int64)) != row_bytes).any():
            path = self._folder / described["raw_data"]["basename"]
            raise DataError(f"{path}: its table of rows does not fit its index; delete the folder and prepare it again")
        return checksums(content, header[1:-1], row_bytes)

    def open(self, shard: int, descriptor: int, checked: Checked) -> OpenMDSShard:
        """The shard over an open file, which stays the caller's, and what its check gave."""
        return OpenMDSShard(self._shards[shard], self._folder, descriptor, checked, self._context * self._dtype.itemsize)


class OpenMDSShard:
    """Random access to the rows of one open shard: streaming's decoder over checked reads of one file descriptor.

    streaming's own `get_item` opens the file again for every row, which costs a metadata operation each on a network file system.
    """

    def __init__(self, described: dict[str, Any], folder: Path, descriptor: int, checked: Checked, row_bytes: int) -> None:
        try:
            self._reader = import_streaming("streaming.base.format.mds").MDSReader.from_json(str(folder), None, described)
        except (TypeError, ValueError, KeyError) as error:
            raise DataError(f"{folder / 'index.json'}: streaming cannot read its shards ({error}); prepare the folder again") from None
        self._rows = CheckedRows(folder / self._reader.raw_data.basename, descriptor, checked, row_bytes)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The rows `numbers` (in this shard), [n, L] of the stored dtype. Raises ChangedError."""
        return np.stack([self._reader.decode_sample(self._rows.read(number))[COLUMN] for number in numbers])
