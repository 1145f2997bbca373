"""Rows of an open file, each exactly as it was when the whole file was checked.

The hash of a whole shard says that it is good at the moment when it is opened. It stays open for hours, and meanwhile somebody may
write into it, or the disk may fail. So the checksum of every row (CRC-32, 4 bytes a row) is kept, and compared whenever the row is read.
Invariant: `read` gives what was there when the file was checked, or raises ChangedError.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bd3_scale.data.checked_once import Checked
from bd3_scale.errors import DataError


class ChangedError(DataError):
    """A file is not any more what was checked; who opens it again learns what is wrong with it."""


def checksums(content: bytes, offsets: Sequence[int] | np.ndarray, row_bytes: int) -> Checked:
    """Where the rows of a file stand and what they are; `content`: all of it, which has passed its check."""
    view = memoryview(content)
    crc = np.fromiter((zlib.crc32(view[offset : offset + row_bytes]) for offset in offsets), np.uint32, len(offsets))
    return Checked(np.asarray(offsets, np.int64), crc)


class CheckedRows:
    """Rows of `row_bytes` each of the open file `descriptor` called `path`, which was checked."""

    def __init__(self, path: Path, descriptor: int, checked: Checked, row_bytes: int) -> None:
        self._path, self._descriptor, self._row_bytes = path, descriptor, row_bytes
        self._offsets, self._checksums = checked.offsets.tolist(), checked.checksums

    def read(self, number: int) -> bytes:
        """The bytes of row `number`. Raises ChangedError."""
        offset = self._offsets[number]
        try:
            row = os.pread(self._descriptor, self._row_bytes, offset)
        except OSError as error:
            raise ChangedError(f"{self._path}: cannot be read any more ({error.strerror}); check the disk or restore the file") from None
        if len(row) != self._row_bytes or zlib.crc32(row) != self._checksums[number]:
            raise ChangedError(
                f"{self._path}: changed at byte {offset} after it had been checked; do not write to data in use, restore the file"
            )
        return row


class PlainRows:
    """Random access to rows of an open shard that stand in it as plain numbers: a row is one checked read."""

    def __init__(self, rows: CheckedRows, dtype: np.dtype[Any]) -> None:
        self._rows, self._dtype = rows, dtype

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The rows `numbers` (in this shard), [n, L] of the stored dtype. Raises ChangedError."""
        return np.stack([np.frombuffer(self._rows.read(number), self._dtype) for number in numbers])
