"""The content of a plain or compressed file, as a stream of pieces in constant memory.

Read as `gzip -d`, `bzip2 -d`, `xz -d` and `zstd -d --long=31` do: one member (frame) after another, as `cat` and parallel compressors make
them, with or without zeros behind (tapes, block devices). Invariants: a file that is cut short or damaged is an error that names it; a
byte-order mark at the beginning of the file or of a member is no content.
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bd3_scale.errors import DataError

CHUNK = 1 << 20
_COMPRESSED_CHUNK = 1 << 16
"""What decompresses to a thousand times as much still fits."""
_LARGEST_WINDOW = 1 << 31
"""Of --long=31, the largest of zstd: so much memory while such a file is read."""


def _zstandard() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()


COMPRESSIONS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstandard,
}
"""Ending of a name -> what decompresses one member."""


class Place:
    """Bytes of a file read so far."""

    read = 0


def content(path: Path, place: Place) -> Iterator[bytes]:
    """The content of the file `path` in pieces. Raises DataError, OSError where it cannot be opened."""
    engine = next((make for ending, make in COMPRESSIONS.items() if path.name.lower().endswith(ending)), None)
    with path.open("rb") as file:
        members = _members(path, file, engine, place) if engine is not None else _plain(file, place)
        yield from _without_marks(members)


def _plain(file: BinaryIO, place: Place) -> Iterator[tuple[bool, bytes]]:
    first = True
    while piece := file.read(CHUNK):
        place.read += len(piece)
        yield first, piece
        first = False


def _members(path: Path, file: BinaryIO, make: Callable[[], Any], place: Place) -> Iterator[tuple[bool, bytes]]:
    """(whether a member begins, content) pieces."""
    import zstandard

    engine: Any = None
    begun = False
    try:
        while piece := file.read(_COMPRESSED_CHUNK):
            place.read += len(piece)
            while piece:
                first = engine is None
                if first:
                    piece = piece.lstrip(b"\0") if begun else piece
                    if not piece:
                        break
                    engine, begun = make(), True
                yield first, engine.decompress(piece)
                piece = b""
                if engine.eof:
                    engine, piece = None, engine.unused_data
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path}: is damaged ({error}); fetch it again") from None
    if engine is not None or not begun:
        raise DataError(f"{path}: is cut short, its compressed data have no end; fetch it again")


def _without_marks(pieces: Iterator[tuple[bool, bytes]]) -> Iterator[bytes]:
    head: bytes | None = b""
    for first, piece in pieces:
        if first:
            yield head or b""
            head = b""
        if head is not None:
            head += piece
            if len(head) < len(codecs.BOM_UTF8):
                continue
            piece, head = head.removeprefix(codecs.BOM_UTF8), None
        yield piece
    yield head or b""
