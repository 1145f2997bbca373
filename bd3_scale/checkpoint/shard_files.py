"""One rank's file of a checkpoint: raw safetensors, written in one pass with its SHA-256, read by byte range.

The file is what the safetensors library writes and reads (8 bytes header length, JSON header, the elements, little endian);
here it is written tensor by tensor, so that nothing is held twice, and read with `preadv` instead of the library's memory map:
a file that shrinks or a failing disk is then an OSError and not a SIGBUS that ends the process without a word.
Invariants: a file is created new and on the disk (fsync) before its hash is handed out; a reader hands out elements only of
the tensors it was told to expect, fp32 and of the expected size.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from bd3_scale.checkpoint.fragments import Fragment, copy_pieces
from bd3_scale.checkpoint.index import FileRecord, part_key
from bd3_scale.checkpoint.region import CopyPlan
from bd3_scale.errors import CheckpointError

CHUNK = 1 << 24
"""Bytes moved at once: what a write copies to the host, what a read gathers before it scatters."""
PAGE = 4096
"""A gap of up to a page between two wanted ranges is read over: the operating system reads whole pages anyway."""
LARGEST_HEADER = 100_000_000
"""The safetensors library's own limit."""


def write_shard(path: Path, fragments: Sequence[Fragment]) -> FileRecord:
    """Write `fragments` in the order given to a new file; on the disk when this returns. Raises OSError."""
    header: dict[str, dict[str, object]] = {}
    end = 0
    for fragment in fragments:
        begin, end = end, end + 4 * fragment.region.numel
        key = part_key(fragment.kind, fragment.name, fragment.region)
        if key in header:
            raise CheckpointError(f"{fragment.kind} of {fragment.name} is given twice by one rank, the same region each time")
        header[key] = {"dtype": "F32", "shape": [fragment.region.numel], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-len(text) % 8)  # the elements start at a multiple of 8, as the library has it
    if len(text) > LARGEST_HEADER:
        raise CheckpointError(f"{len(fragments)} fragments on one rank make a safetensors header above {LARGEST_HEADER} bytes")
    digest = hashlib.sha256()
    size = 0
    with open(path, "xb") as file:
        head = struct.pack("<Q", len(text)) + text
        file.write(head)
        digest.update(head)
        size += len(head)
        for fragment in fragments:
            for values in fragment.value.detach().split(CHUNK // 4):
                block = _little_endian(values.cpu().contiguous().numpy()).data.cast("B")
                file.write(block)
                digest.update(block)
                size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def write_text(path: Path, text: bytes) -> FileRecord:
    """Write a small new file; on the disk when this returns. Raises OSError."""
    with open(path, "xb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(text), hashlib.sha256(text).hexdigest())


def regular_size(path: Path) -> int:
    """Bytes of a regular file; CheckpointError for anything else (a link leads out of the folder, a device never ends)."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name} is not a regular file")
    return status.st_size


def check_size(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError unless `path` is a regular file of the recorded size."""
    size = regular_size(path)
    if size != record.bytes:
        raise CheckpointError(f"{path.name} has {size} bytes instead of {record.bytes}")


def read_text(path: Path, largest: int) -> bytes:
    """A small regular file. Raises CheckpointError where it is none, above `largest` bytes, or unreadable."""
    size = regular_size(path)
    if size > largest:
        raise CheckpointError(f"{path.name} has {size} bytes, which is more than it can have")
    try:
        with open(path, "rb") as file:
            return file.read(largest)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from None


def check_content(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError unless `path` has the recorded size and SHA-256. Reads the whole file."""
    check_size(path, record)
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from None
    if found != record.sha256:
        raise CheckpointError(f"{path.name} was damaged or changed after it was written (its SHA-256 does not match)")


class ShardReader:
    """Reads ranges of the parts of one file. `expected`: part key -> elements; the file must hold exactly these, in fp32.

    A context manager. Raises CheckpointError for anything else, also while reading.
    """

    def __init__(self, path: Path, expected: Mapping[str, int]) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from None
        try:
            self._begin = self._read_header(expected)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_header(self, expected: Mapping[str, int]) -> dict[str, int]:
        """Part key -> byte at which its elements begin."""
        size = os.fstat(self._file.fileno()).st_size
        prefix = bytearray(8)
        self._fill(memoryview(prefix), 0)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(LARGEST_HEADER, size - 8):
            raise CheckpointError(f"{self.path.name} is not a safetensors file")
        text = bytearray(length)
        self._fill(memoryview(text), 8)
        try:
            header = json.loads(text.decode("ascii"))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{self.path.name} is not a safetensors file (its header is not JSON)") from None
        if not isinstance(header, dict) or set(header) != set(expected):
            raise CheckpointError(f"{self.path.name} holds other tensors than the index says")
        begins = {}
        for key, entry in header.items():
            offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
            begin = offsets[0] if isinstance(offsets, list) and offsets and type(offsets[0]) is int else -1
            right = {"dtype": "F32", "shape": [expected[key]], "data_offsets": [begin, begin + 4 * expected[key]]}
            if begin < 0 or entry != right or 8 + length + begin + 4 * expected[key] > size:
                raise CheckpointError(f"{self.path.name}: {key} is not fp32 of {expected[key]} elements inside the file")
            begins[key] = 8 + length + begin
        return begins

    def read(self, key: str, pieces: CopyPlan, target: torch.Tensor) -> None:
        """target[pieces.target] = part[pieces.source]; target is 1-D, contiguous, fp32, on the host. Reads these ranges only."""
        if len(pieces.length) == 0:
            return
        source, length = pieces.source, pieces.length
        elements = CHUNK // 4
        gap = source[1:] - (source[:-1] + length[:-1])
        # One read per stretch without a gap above a page; a long stretch is cut where it passes a multiple of the chunk.
        new_read = (gap * 4 > PAGE) | (source[1:] // elements != source[:-1] // elements)
        bounds = [0, *(np.flatnonzero(new_read) + 1).tolist(), len(length)]
        for first, last in itertools.pairwise(bounds):
            begin, end = int(source[first]), int(source[last - 1] + length[last - 1])
            at = self._begin[key] + 4 * begin
            if last - first == 1:
                place = int(pieces.target[first])
                self._fill_elements(target[place : place + end - begin], at)
                continue
            buffer = torch.empty(end - begin, dtype=torch.float32)
            self._fill_elements(buffer, at)
            copy_pieces(buffer, target, CopyPlan(length[first:last], source[first:last] - begin, pieces.target[first:last]))

    def _fill_elements(self, target: torch.Tensor, at: int) -> None:
        values = target.detach().numpy()
        self._fill(values.data.cast("B"), at)
        if sys.byteorder == "big":
            values.byteswap(inplace=True)

    def _fill(self, buffer: memoryview, at: int) -> None:
        """Fill `buffer` from byte `at`."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._file.fileno(), [buffer[done:]], at + done)
            except OSError as error:
                raise CheckpointError(f"{self.path.name} cannot be read ({error.strerror})") from None
            if count == 0:
                raise CheckpointError(f"{self.path.name} ends too early")
            done += count


def _little_endian(values: np.ndarray) -> np.ndarray:
    """The values in the byte order of safetensors; no copy on little-endian machines."""
    return values if sys.byteorder == "little" else values.byteswap()
