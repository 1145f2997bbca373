"""The texts in the files of a corpus (corpus.py), one after another, as a stream.

Invariants: the order is that of the files; a record that is not what it should be (not UTF-8, no such field, null) is an error that names
file and line, or row group and row, and is left out only where the caller allows for so many, and then counted; blank lines of JSON are
nothing; time grows with the bytes, whatever the lengths of lines; nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from bd3_scale.data.preparation.compression import Place, content
from bd3_scale.data.preparation.corpus import TABLES, kind_of
from bd3_scale.errors import DataError

LONGEST = 1 << 30
"""Bytes of the longest document, and of the longest line. A document takes several times its length of memory."""
MARK = "\ufeff"
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The last bytes of an Arrow stream. pyarrow takes a stream without them, cut between two batches, for a whole one."""


class BadRecords:
    """What was left out. `found`: (documents before it, what is wrong) of each."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.found: list[tuple[int, str]] = []
        self.documents = 0

    def add(self, path: Path, problem: str, cure: str = "fix it") -> None:
        """One more. Raises DataError where that is too many."""
        if len(self.found) >= self.limit:
            more = "" if not self.limit else f" (and {self.limit} were left out before it)"
            raise DataError(f"{path}: {problem}{more}; {cure}, or --skip-bad N leaves out up to N such records")
        self.found.append((self.documents, f"{path.name}: {problem}"))


def texts(
    files: Iterable[Path], text_key: str = "text", *, by_line: bool = False, bad: BadRecords | None = None, longest: int = LONGEST
) -> Iterator[tuple[str, int]]:
    """(text, bytes of the corpus read so far) of every document. `text_key`: the field or column that holds it. `by_line`: plain
    text has a document in each line, given with its end. `bad`: what may be left out, nothing by default; `longest`: bytes that a document
    may have. Raises DataError."""
    before, bad = 0, BadRecords() if bad is None else bad
    for path in files:
        place = Place()
        try:
            for text in _texts(path, text_key, by_line, bad, longest, place):
                bad.documents += 1
                yield text, before + place.read
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); fix the file or leave it out") from None
        before += path.stat().st_size


def require_readable(files: Sequence[Path], text_key: str, skip_bad: int) -> None:
    """Look at the beginning of every file, or at its columns, before any work is done. Raises DataError."""
    bad = BadRecords(skip_bad)
    for path in files:
        if kind_of(path) in TABLES:
            _Table(path, text_key)
        else:
            next(texts([path], text_key, bad=bad), None)


def _texts(path: Path, key: str, by_line: bool, bad: BadRecords, longest: int, place: Place) -> Iterator[str]:
    kind = kind_of(path)
    if kind in TABLES:
        return _Table(path, key).texts(bad, place)
    found = lines(content(path, place), path, longest)
    if kind == ".jsonl":
        return _json_texts(found, path, key, bad)
    return _line_texts(found, path, bad) if by_line else _plain_texts(found, path, bad, longest)


def lines(pieces: Iterable[bytes], path: Path, longest: int) -> Iterator[bytes]:
    """Lines with their ends."""
    parts: list[bytes] = []
    length = 0
    for piece in pieces:
        for number, part in enumerate(piece.split(b"\n")):
            if number:
                yield b"".join([*parts, b"\n"])
                parts, length = [], 0
            parts.append(part)
            length += len(part)
            if length > longest:
                raise _too_long(path, longest)
    if length:
        yield b"".join(parts)


def _too_long(path: Path, longest: int) -> DataError:
    return DataError(
        f"{path}: has a line or a document longer than {longest} bytes; --longest BYTES allows for more (and takes several times so much "
        "memory), and in .txt an empty line ends a document"
    )


class _Bad(ValueError):
    """What is wrong with a record."""


def _decoded(line: bytes, number: int) -> str:
    """Without byte-order marks at its beginning, which files joined by `cat` have in their middle."""
    try:
        text = line.decode("utf-8").lstrip(MARK)
    except UnicodeDecodeError:
        raise _Bad(f"line {number} is not UTF-8; convert the file") from None
    if "\0" in text:
        raise _Bad(f"line {number} has zero bytes, as a crash leaves them")
    return text


def json_records(path: Path, bad: BadRecords, longest: int = LONGEST) -> Iterator[tuple[Any, int, int]]:
    """(what a line of JSON says, None where it is no JSON; number of the line; bytes of the file read so far) of every line that is not
    blank. Raises DataError."""
    place = Place()
    try:
        for record, number in _json_lines(lines(content(path, place), path, longest), path, bad):
            yield record, number, place.read
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); fix the file or leave it out") from None


def _json_texts(found: Iterator[bytes], path: Path, key: str, bad: BadRecords) -> Iterator[str]:
    for record, number in _json_lines(found, path, bad):
        if isinstance(record, dict) and isinstance(record.get(key), str):
            yield record[key]
        else:
            bad.add(path, f'line {number} is not an object with a string under "{key}" (--text-key names another)')


def _json_lines(found: Iterator[bytes], path: Path, bad: BadRecords) -> Iterator[tuple[Any, int]]:
    for number, line in enumerate(found, 1):
        try:
            text = _decoded(line, number)
            if text.strip():
                yield _json(text, number, path), number
        except _Bad as error:
            bad.add(path, str(error))


def _json(line: str, number: int, path: Path) -> Any:
    """None of what is no JSON."""
    try:
        record = json.loads(line, object_pairs_hook=_once, parse_int=float)  # no number is read, however long it is
    except _Bad as error:
        raise _Bad(f"line {number} {error}") from None
    except (ValueError, RecursionError):
        record = None
    if number == 1 and line.startswith("["):
        raise DataError(f"{path}: is a JSON array; write an object a line (jq -c '.[]' FILE > FILE.jsonl)")
    return record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Bad(f'has the key "{next(name for name in names if names.count(name) > 1)}" twice')
    return record


def _line_texts(found: Iterator[bytes], path: Path, bad: BadRecords) -> Iterator[str]:
    for number, line in enumerate(found, 1):
        try:
            text = _decoded(line, number)
        except _Bad as error:
            bad.add(path, str(error))
        else:
            yield text


def _plain_texts(found: Iterator[bytes], path: Path, bad: BadRecords, longest: int) -> Iterator[str]:
    """Documents that an empty line ends."""
    document: list[str] = []
    length, problem = 0, ""
    for number, line in enumerate(chain(found, [b""]), 1):
        try:
            text = _decoded(line, number)
        except _Bad as error:
            problem = problem or str(error)
            continue
        if text.strip():
            document.append(text)
            length += len(line)
            if length > longest:
                raise _too_long(path, longest)
            continue
        if problem:
            bad.add(path, problem)
        elif document:
            yield "".join(document).rstrip("\r\n")
        document, length, problem = [], 0, ""


class _Table:
    """The column `key` of a Parquet file, or of the Arrow stream that `datasets` writes."""

    def __init__(self, path: Path, key: str) -> None:
        import pyarrow
        from pyarrow import parquet

        self.path, self.key, self.size = path, key, path.stat().st_size
        self.parquet: Any = None
        try:
            if kind_of(path) == ".parquet":
                self.parquet = parquet.ParquetFile(path)
                schema = self.parquet.schema_arrow
            else:
                with path.open("rb") as file:
                    file.seek(max(0, self.size - len(_STREAM_END)))
                    if file.read() != _STREAM_END:
                        raise DataError(f"{path}: is cut short, or no stream of Arrow batches; fetch or save it again")
                self.stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
                schema = self.stream.schema
        except pyarrow.ArrowException as error:
            raise self._damaged(error) from None
        count = schema.names.count(key)
        if count == 0:
            raise DataError(f"{path}: has no column {key!r}, only {', '.join(schema.names)}; give --text-key")
        if count > 1:
            raise DataError(f"{path}: has {count} columns {key!r}; rename one of them")
        kind = schema.field(key).type
        plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not any(one(plain) for one in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_null)):
            raise DataError(f"{path}: column {key!r} is {kind}, not text; give --text-key, or write its text into a column of strings")

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self.path}: is damaged or no table ({' '.join(str(error).split())[:200]}); fetch it again")

    def texts(self, bad: BadRecords, place: Place) -> Iterator[str]:
        import pyarrow

        groups = [None] if self.parquet is None else range(self.parquet.num_row_groups)
        rows = 0 if self.parquet is None else self.parquet.metadata.num_rows
        done = 0
        try:
            for group in groups:
                row = 0
                where = "" if group is None else f" of row group {group + 1}"
                batches = self.stream if group is None else self.parquet.iter_batches(1024, [group], columns=[self.key])
                for batch in batches:
                    for text in _values(batch.column(batch.schema.get_field_index(self.key))):
                        row += 1
                        if isinstance(text, str):
                            yield text
                        else:
                            problem = "is not UTF-8" if text is UnicodeDecodeError else f"has no text under {self.key!r}"
                            bad.add(self.path, f"row {row}{where} {problem}")
                    done += batch.num_rows
                    place.read = self.size * done // rows if rows else min(self.size, place.read + batch.nbytes)
        except pyarrow.ArrowException as error:
            raise self._damaged(error) from None


def _values(column: Any) -> list[Any]:
    """Values of a column; UnicodeDecodeError stands for one that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return UnicodeDecodeError
