"""Rows of shards that another program wrote, read where they stand.

An adopted folder (preparation/adopt.py) has links to those shards, and an index of its own: {"kind": mds | webdataset | arrow, "column",
"shards": [{"file", "first", "from"}]}. The rows of a shard are as many as the manifest says, from row `first` of the file on. Invariant:
a shard opened here has rows of exactly the manifest's context and type.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bd3_scale.data.checked_once import Checked
from bd3_scale.data.formats.checked_rows import CheckedRows, PlainRows, checksums
from bd3_scale.data.formats.foreign import COLUMNS
from bd3_scale.data.manifest import Manifest, Split
from bd3_scale.errors import DataError

_AGAIN = "adopt the folder again, into a new --path"


class AdoptedIndex:
    """The index of one split, checked against the manifest; opens its shards."""

    def __init__(self, content: bytes, folder: Path, manifest: Manifest, split: Split) -> None:
        self._folder, self._split, self._dtype = folder, split, np.dtype(manifest.dtype)
        self._row_bytes = manifest.context * self._dtype.itemsize
        try:
            index = json.loads(content)
            self._locate, self._column = COLUMNS[index["kind"]], str(index["column"])
            self._first = [int(shard["first"]) for shard in index["shards"]]
            same = [shard["file"] for shard in index["shards"]] == [shard.file for shard in split.shards]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{folder / split.index.file}: is not an index of adopted shards; {_AGAIN}") from None
        if not same:
            raise DataError(f"{folder / split.index.file}: does not describe the shards that the manifest names; {_AGAIN}")

    def check(self, shard: int, content: bytes) -> Checked:
        """The rows in the content of a shard, whose hash is right. Raises DataError."""
        entry, first = self._split.shards[shard], self._first[shard]
        path = self._folder / entry.file
        column = self._locate(content, path, self._column)
        offsets, sizes = (values[first : first + entry.rows] for values in (column.offsets, column.sizes))
        if len(offsets) != entry.rows or (sizes != self._row_bytes).any() or column.dtype not in (None, self._dtype):
            raise DataError(f"{path}: does not hold the rows that the manifest names; {_AGAIN}")
        return checksums(content, offsets, self._row_bytes)

    def open(self, shard: int, descriptor: int, checked: Checked) -> PlainRows:
        """The shard over an open file, which stays the caller's, and what its check gave."""
        path = self._folder / self._split.shards[shard].file
        return PlainRows(CheckedRows(path, descriptor, checked, self._row_bytes), self._dtype)
