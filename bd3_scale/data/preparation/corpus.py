"""Texts of a corpus in one fixed order, whatever they lie in: .txt, .jsonl, both as .gz or .zst, .parquet, or a `datasets` folder.

A source is a file, a folder, or a pattern. A folder stands for the files of a known kind below it (hidden ones aside); one that the
Hugging Face library `datasets` wrote (save_to_disk), for the .arrow files that its state.json lists: what `map` and `filter` cached
beside them is other text. Everything is read as a stream, in constant memory. Invariants: the order is that of the sources, then of the
sorted names, then of the file; a line or a file that is not what it should be (not UTF-8, no such field, cut short) is an error that
names it, never a document less; nothing is unpickled.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bd3_scale.errors import DataError

KINDS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst", ".parquet", ".arrow")
CHUNK = 1 << 20
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The last bytes of an Arrow stream. pyarrow takes a stream without them, cut between two batches, for a whole one."""


def corpus_files(sources: Sequence[str]) -> list[Path]:
    """The files that `sources` stand for, in the order of the corpus. Raises DataError for what stands for none."""
    files: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found = list(_below(path))
        else:
            found = sorted(Path(one) for one in glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else [path]
        if not found:
            raise DataError(f"{source}: holds no file of a kind that can be read; give {', '.join(KINDS)}")
        for one in found:
            if _kind(one) is None:
                raise DataError(f"{one}: its kind is not known; give {', '.join(KINDS)}")
            if not one.is_file():
                raise DataError(f"{one}: cannot be read (there is no such file); name the files, folders or patterns of the corpus")
        files += found
    return files


def require_once(files: Iterable[Path]) -> None:
    """Raises DataError where a file would be read twice: its documents would be doubled, or held out and trained on."""
    seen: set[Path] = set()
    for path in files:
        if (real := path.resolve()) in seen:
            raise DataError(f"{path}: is in the corpus twice; name each file once, and what is held out not among the sources")
        seen.add(real)


def _below(folder: Path) -> Iterator[Path]:
    """The files of a known kind below `folder`, sorted by name, level by level."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(one.name for one in folder.iterdir() if (one / "state.json").is_file())
        raise DataError(f"{folder}: holds the splits {', '.join(splits)} of a data set; give one of them, such as {folder / 'train'}")
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        yield from _saved(folder)
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path)
        elif _kind(path) is not None:
            yield path


def _saved(folder: Path) -> list[Path]:
    """What `datasets` says is the data of a folder that it saved."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_bytes())
        names = [one["filename"] for one in state["_data_files"]]
        plain = all(isinstance(name, str) and Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError):
        plain = False
    if not plain:
        raise DataError(f"{path}: is not the state of a data set as save_to_disk writes it; save it again, or name the .arrow files")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{path}: has a selection of rows, which is not read here; save the data set again with flatten_indices()")
    return [folder / name for name in names]


def _kind(path: Path) -> str | None:
    return next((kind for kind in KINDS if path.name.endswith(kind)), None)


def texts(files: Iterable[Path], text_key: str = "text", *, by_line: bool = False) -> Iterator[tuple[str, int]]:
    """(text, bytes of the corpus read so far) of every document. `text_key`: the field or column that holds it. `by_line`: plain
    text has a document in each line, given with its end. Raises DataError."""
    before = 0
    for path in files:
        kind = _kind(path)
        place = _Place()
        try:
            if kind in (".parquet", ".arrow"):
                found = _tables(path, text_key, kind, place)
            else:
                lines = _lines(_opened(path, place), path)
                found = _json_texts(lines, path, text_key) if ".jsonl" in path.name else lines if by_line else _plain_texts(lines)
            for text in found:
                yield text, before + place.read
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); fix the file or leave it out") from None
        before += path.stat().st_size


class _Place:
    """Bytes of the file read so far."""

    read = 0


def _opened(path: Path, place: _Place) -> Iterator[bytes]:
    """The content of a plain or compressed file, in pieces."""
    with path.open("rb") as file:
        pieces = _counted(file, place)
        if path.suffix == ".gz":
            pieces = _decompressed(pieces, path, lambda: zlib.decompressobj(wbits=31), (zlib.error, gzip.BadGzipFile))
        elif path.suffix == ".zst":
            import zstandard

            pieces = _decompressed(pieces, path, lambda: zstandard.ZstdDecompressor().decompressobj(), (zstandard.ZstdError,))
        yield from pieces


def _counted(file: object, place: _Place) -> Iterator[bytes]:
    while piece := file.read(CHUNK):  # type: ignore[attr-defined]
        place.read += len(piece)
        yield piece


def _decompressed(pieces: Iterator[bytes], path: Path, make: object, errors: tuple[type[Exception], ...]) -> Iterator[bytes]:
    """Of one frame after another, as parallel compressors write them; a last frame that has no end is an error."""
    engine = make()  # type: ignore[operator]
    begun = False
    try:
        for piece in pieces:
            while piece:
                if engine.eof:
                    engine = make()  # type: ignore[operator]
                yield engine.decompress(piece)
                begun, piece = True, engine.unused_data if engine.eof else b""
    except errors as error:
        raise DataError(f"{path}: is damaged ({error}); fetch it again") from None
    if not (begun and engine.eof):
        raise DataError(f"{path}: is cut short, its compressed data have no end; fetch it again")


def _lines(pieces: Iterator[bytes], path: Path) -> Iterator[str]:
    """Lines with their ends, decoded."""
    number, rest = 0, b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            number += 1
            yield _decoded(line + b"\n", path, number)
    if rest:
        yield _decoded(rest, path, number + 1)


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: line {number} is not UTF-8; convert the file") from None


def _json_texts(lines: Iterator[str], path: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)[key]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise DataError(f'{path}: line {number} is not an object with a string under "{key}"; fix the line or give --text-key')
        yield text


def _plain_texts(lines: Iterator[str]) -> Iterator[str]:
    """Documents that an empty line ends."""
    document: list[str] = []
    for line in lines:
        if line.strip():
            document.append(line)
        elif document:
            yield "".join(document).rstrip("\r\n")
            document = []
    if document:
        yield "".join(document).rstrip("\r\n")


def _tables(path: Path, key: str, kind: str, place: _Place) -> Iterator[str]:
    """The column `key` of a Parquet file, or of the Arrow stream that `datasets` writes."""
    import pyarrow
    from pyarrow import parquet

    size = path.stat().st_size
    try:
        if kind == ".parquet":
            table = parquet.ParquetFile(path)
            names, rows, batches = table.schema_arrow.names, table.metadata.num_rows, table.iter_batches(1024, columns=[key])
        else:
            with path.open("rb") as file:
                file.seek(max(0, size - len(_STREAM_END)))
                if file.read() != _STREAM_END:
                    raise DataError(f"{path}: is cut short, or no stream of Arrow batches; fetch or save it again")
            stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
            names, rows, batches = stream.schema.names, 0, iter(stream)
        if key not in names:
            raise DataError(f"{path}: has no column {key!r}, only {', '.join(names)}; give --text-key")
        done = 0
        for batch in batches:
            for text in batch.column(batch.schema.get_field_index(key)).to_pylist():
                done += 1
                if not isinstance(text, str):
                    raise DataError(f"{path}: row {done} has no text under {key!r}; fix the file or give --text-key")
                yield text
            place.read = size * done // rows if rows else min(size, place.read + batch.nbytes)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is damaged or no {kind} file ({' '.join(str(error).split())[:200]}); fetch it again") from None
