"""Folders of token ids that other programs wrote become data folders: every row is read once and checked, nothing is written again.

What is taken: MDS (mosaicml-streaming, llm-foundry), tar shards of numpy arrays (webdataset), Arrow as `datasets` saves it. The data folder
gets links to those files, an index, and the manifest: sizes, hashes, context, type of the ids. Rows that are held out and stand in one file
with others are told apart by their numbers. Invariants: the other folder is only read; every row has the same length and every id is one
of the tokenizer's text, or the first that is not is named; a folder that is there already was adopted from the same by the same options.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bd3_scale.data.formats.foreign import COLUMNS, NAMES, Column, chosen
from bd3_scale.data.formats.mds import xxh64
from bd3_scale.data.formats.streaming_compat import import_streaming
from bd3_scale.data.manifest import ADOPTED, MANIFEST, SPLITS, FileEntry, Manifest, Split
from bd3_scale.data.preparation.destination import CONTENT, claimed, publish
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.errors import DataError
from bd3_scale.files import expanded
from bd3_scale.messages import log

FILLING = 16
"""So many times the same id at an end of a row look like filling."""
WIDTHS = ("<i8", "<i4", "<u2")
"""Of ids that are stored as bytes, the widest first."""


@dataclass(frozen=True)
class Foreign:
    """The files of one split of another program, in order."""

    folder: Path
    kind: str
    """mds | webdataset | arrow."""
    files: tuple[Path, ...]
    said: tuple[dict[str, Any], ...]
    """What the index says of each file: {} where there is none."""


@dataclass(frozen=True)
class Piece:
    """`rows` rows of a file, from its row `first` on, and how many ends of text they hold."""

    path: Path
    bytes: int
    xxh64: str
    first: int
    rows: int
    ends: int


@dataclass
class _Seen:
    """What the rows have in common so far."""

    column: str | None
    context: int | None
    dtype: np.dtype[Any] | None = None
    begins: bool = True
    """All rows begin with an end of text."""
    closes: bool = True
    masked: bool = False
    """Whether the last file has an `attention_mask`, which says that nothing is filling."""
    filled: Counter[int] = field(default_factory=Counter)
    """Rows that look filled up, by the id that one of their ends is made of."""


def adopt(folder: Path, source: str, tokenizer: Tokenizer, *, context: int | None, column: str | None, validation: str) -> Manifest:
    """Make `folder` a data folder of what stands in the folder `source`; its manifest. `context`: what rows must have (None: whatever the
    first has). `validation`: a share of the rows, last:N rows, or another folder; a folder of the source that is called so comes first.

    Raises DataError for what is no data, and for the first row that is not like the others or not of this tokenizer.
    """
    train, held = _splits(expanded(source).absolute(), validation)
    rule = held.folder.name if held is not None else validation
    options: dict[str, Any] = {"adopted": str(train.folder), "kind": train.kind, "validation": rule, "column": column or "the usual"}
    with claimed(folder) as scratch:
        if scratch is None:
            manifest = Manifest.load(folder / MANIFEST)
            for key, wanted in options.items():
                if (was := manifest.options.get(key)) != wanted:
                    raise DataError(f"{folder}: is there already, with {key} {was}, asked for is {key} {wanted}; give another --path")
            return manifest
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            seen = _Seen(column, context)
            pieces = {"train": _checked(train, tokenizer, seen)}
            if held is None:
                pieces["train"], pieces["validation"] = _divided(train, pieces["train"], validation, tokenizer, seen)
            else:
                pieces["validation"] = _checked(held, tokenizer, seen)
            _tell_of_filling(train.folder, seen, sum(piece.rows for split in pieces.values() for piece in split))
            manifest = _write(scratch / CONTENT, {"train": train, "validation": held or train}, pieces, tokenizer, seen, rule, options)
            publish(folder)
        except OSError as error:
            raise DataError(f"{folder}: {error.filename or ''} {error.strerror}; make it readable, or free space") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return manifest


# -- What is there -----------------------------------------------------------------------------------------------------


def _splits(folder: Path, validation: str) -> tuple[Foreign, Foreign | None]:
    """The files to train on, and those that are held out as a whole; None: those are rows of the former."""
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder; give one that another program filled with shards of token ids")
    other = None if validation.startswith("last:") or _number(validation) is not None else _required(expanded(validation).absolute())
    if (alone := _foreign(folder)) is not None:
        return alone, other
    found = {one.name: split for one in sorted(folder.iterdir()) if one.is_dir() and (split := _foreign(one)) is not None}
    trains, helds = ([name for name in found if name.startswith(start)] for start in ("train", "val"))
    if len(trains) != 1 or (other is None and len(helds) > 1):
        names = ", ".join(found) or "nothing that is known"
        raise DataError(
            f"{folder}: holds {names}; give the one to train on, --adopt {folder}/NAME, and what is held out, --validation {folder}/NAME "
            "(MDS: index.json and shards; webdataset: .tar; datasets: state.json and .arrow)"
        )
    return found[trains[0]], other or (found[helds[0]] if helds else None)


def _required(folder: Path) -> Foreign:
    if not folder.is_dir() or (found := _foreign(folder)) is None:
        raise DataError(f"--validation {folder}: is neither a share, last:N, nor a folder with shards of token ids; give one of them")
    return found


def _foreign(folder: Path) -> Foreign | None:
    """What stands in a folder itself; None: nothing that is known."""
    if (folder / "index.json").is_file():
        shards = _json(folder / "index.json").get("shards")
        if not isinstance(shards, list) or not all(isinstance(one, dict) and one.get("format") == "mds" for one in shards):
            raise DataError(f"{folder / 'index.json'}: is no index of MDS shards; write the folder as MDS, or prepare the text")
        if packed := [one for one in shards if one.get("compression")]:
            name = packed[0].get("zip_data", {}).get("basename", "a shard")
            raise DataError(
                f"{folder}: {name} is compressed ({packed[0]['compression']}), and rows are read where they stand; unpack the shards, or "
                "write them with compression=None"
            )
        return Foreign(folder, "mds", _named(folder / "index.json", shards, "raw_data", "basename"), tuple(shards))
    if (folder / "state.json").is_file():
        files = _named(folder / "state.json", _json(folder / "state.json").get("_data_files", []), "filename")
        return Foreign(folder, "arrow", files, ({},) * len(files))
    for kind, suffix in (("webdataset", ".tar"), ("arrow", ".arrow")):
        if files := tuple(sorted(folder.glob(f"*{suffix}"))):
            return Foreign(folder, kind, files, ({},) * len(files))
    return None


def _named(index: Path, entries: Any, *keys: str) -> tuple[Path, ...]:
    """The files that the entries of an index name, in its folder or below it."""
    names: list[Any] = list(entries) if isinstance(entries, list) else [None]
    for key in keys:
        names = [name.get(key) if isinstance(name, dict) else None for name in names]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{index}: has an entry without {'.'.join(keys)}; restore it")
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise DataError(f"{index}: names {outside[0]}, which does not lie in its folder; write the folder again")
    return tuple(index.parent / name for name in names)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it") from None
    return content if isinstance(content, dict) else {}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# -- Row by row --------------------------------------------------------------------------------------------------------


def _checked(foreign: Foreign, tokenizer: Tokenizer, seen: _Seen) -> list[Piece]:
    """The files of a split, every row checked."""
    pieces = []
    for path, said in zip(foreign.files, foreign.said, strict=True):
        content = _content(path, said)
        rows = _rows(content, path, _column(foreign.kind, content, path, seen, tokenizer), tokenizer, seen)
        if said and len(rows) != said.get("samples"):
            raise DataError(f"{path}: holds {len(rows)} rows, its index says {said.get('samples')}; restore it")
        seen.begins &= bool((rows[:, 0] == tokenizer.end_of_text).all())
        seen.closes &= bool((rows[:, -1] == tokenizer.end_of_text).all())
        if not seen.masked:
            seen.filled.update(_filling(rows, tokenizer.end_of_text))
        if len(rows):
            ends = int((rows == tokenizer.end_of_text).sum())
            pieces.append(Piece(path, len(content), xxh64(content), 0, len(rows), ends))
    if not pieces:
        raise DataError(f"{foreign.folder}: holds no row; give a folder with some")
    return pieces


def _filling(rows: np.ndarray, end: int) -> list[int]:
    """The id that a row is filled up with, of those that seem so: it stands `FILLING` times or more at an end, or before an end of text."""
    if rows.shape[1] < 2 * FILLING:
        return []
    inner = np.where(rows[:, -1:] == end, rows[:, -FILLING - 1 : -1], rows[:, -FILLING:])
    found = [(edge[:, 0], (edge == edge[:, :1]).all(1)) for edge in (inner, rows[:, :FILLING])]
    return list(np.concatenate([ids[same] for ids, same in found]))


def _tell_of_filling(folder: Path, seen: _Seen, rows: int) -> None:
    """Of more rows than end so by chance."""
    for token, count in seen.filled.most_common(1):
        if count > rows / 100:
            log.warning(
                f"{folder}: {count:,} of {rows:,} rows have id {token} {FILLING} times or more at an end; if that is filling, it is "
                "learnt as text: prepare the text with --packing document or best_fit, whose filling does not count"
            )


def _content(path: Path, said: dict[str, Any]) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    raw = said.get("raw_data", {})
    if raw and raw.get("bytes") != len(content):
        raise DataError(f"{path}: has {len(content)} bytes, its index says {raw.get('bytes')} (truncated or replaced); restore it")
    for algorithm, wanted in raw.get("hashes", {}).items():
        if import_streaming("streaming.base.hashing").get_hash(algorithm, content) != wanted:
            raise DataError(f"{path}: is damaged, its {algorithm} is not what its index says; restore it")
    return content


def _column(kind: str, content: bytes, path: Path, seen: _Seen, tokenizer: Tokenizer) -> Column:
    """The column of ids, whose type is that of all files."""
    names = NAMES[kind](content, path)
    seen.column = chosen(path, names, seen.column)
    column = COLUMNS[kind](content, path, seen.column)
    dtype = column.dtype
    if dtype is None:
        dtype = seen.dtype or _width(content, path, column, tokenizer.vocabulary_size)
    if seen.dtype is not None and dtype != seen.dtype:
        raise DataError(f"{path}: its ids are {dtype.name}, those of the files before are {seen.dtype.name}; write the folder again")
    seen.dtype = dtype
    seen.masked = "attention_mask" in names
    if seen.masked:
        mask = COLUMNS[kind](content, path, "attention_mask")
        for row, (start, size) in enumerate(zip(mask.offsets.tolist(), mask.sizes.tolist(), strict=True)):
            if mask.dtype is not None and not np.frombuffer(content, mask.dtype, size // mask.dtype.itemsize, start).all():
                raise DataError(
                    f"{path}: row {row} is filled up (its attention_mask has a 0), and filling would be learnt as text; prepare the text"
                )
    return column


def _width(content: bytes, path: Path, column: Column, vocabulary_size: int) -> np.dtype[Any]:
    """The type of ids that are stored as bytes: the widest of which nine in ten are ids. Wider ones than they are would be far too large,
    and of narrower ones more than half are 0."""
    raw = b"".join(content[start : start + size] for start, size in zip(column.offsets.tolist(), column.sizes.tolist(), strict=True))
    for width in map(np.dtype, WIDTHS):
        if len(raw) % width.itemsize == 0 and len(raw):
            values = np.frombuffer(raw, width)
            if ((values >= 0) & (values < vocabulary_size)).mean() > 0.9:
                return width
    raise DataError(
        f"{path}: its column of bytes is no row of int64, int32 or uint16 ids below {vocabulary_size}; name its --tokenizer or another "
        "--column, or prepare the text"
    )


def _rows(content: bytes, path: Path, column: Column, tokenizer: Tokenizer, seen: _Seen) -> np.ndarray:
    """All rows of a file, [n, L] of their type."""
    assert seen.dtype is not None
    dtype = seen.dtype
    if seen.context is None and len(column.sizes):
        seen.context = int(column.sizes[0]) // dtype.itemsize
    length = seen.context or 1
    if (wrong := np.flatnonzero(column.sizes != length * dtype.itemsize)).size:
        row = int(wrong[0])
        raise DataError(
            f"{path}: row {row} has {column.sizes[row] / dtype.itemsize:g} tokens, needed are {length} in every row (model.context); give "
            "--context where all rows have another length, or prepare the text"
        )
    found = [np.frombuffer(content, dtype, length, start) for start in column.offsets.tolist()]
    rows = np.stack(found) if found else np.empty((0, length), dtype)
    outside = (rows < 0) | (rows >= tokenizer.vocabulary_size)
    if outside.any():
        row, place = (int(one[0]) for one in np.nonzero(outside))
        raise DataError(
            f"{path}: row {row} has id {rows[row, place]} at {place}, tokenizer {tokenizer.name} has 0 to {tokenizer.vocabulary_size - 1}; "
            "name the --tokenizer that wrote it, or prepare the text"
        )
    return rows


def _divided(foreign: Foreign, pieces: list[Piece], rule: str, tokenizer: Tokenizer, seen: _Seen) -> tuple[list[Piece], list[Piece]]:
    """The rows to train on, and the last ones, which are held out."""
    total = sum(piece.rows for piece in pieces)
    share = _number(rule.removeprefix("last:"))
    asked = 0 if share is None else int(share) if rule.startswith("last:") else math.ceil(share * total)
    if not 0 < asked < total:
        raise DataError(
            f"{foreign.folder}: --validation {rule} would hold out {asked} of {total} rows; give a share between 0 and 1, or last:N rows"
        )
    left, train, held = total - asked, list[Piece](), list[Piece]()
    for piece in pieces:
        cut = min(piece.rows, max(0, left))
        left -= piece.rows
        before = piece.ends if cut == piece.rows else 0
        if 0 < cut < piece.rows:
            content = _content(piece.path, {})
            rows = _rows(content, piece.path, _column(foreign.kind, content, piece.path, seen, tokenizer), tokenizer, seen)
            before = int((rows[:cut] == tokenizer.end_of_text).sum())
        for side, first, count, ends in ((train, 0, cut, before), (held, cut, piece.rows - cut, piece.ends - before)):
            if count:
                side.append(Piece(piece.path, piece.bytes, piece.xxh64, first, count, ends))
    return train, held


# -- The folder --------------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    foreign: dict[str, Foreign],
    pieces: dict[str, list[Piece]],
    tokenizer: Tokenizer,
    seen: _Seen,
    rule: str,
    options: dict[str, Any],
) -> Manifest:
    assert seen.context is not None and seen.dtype is not None
    special = ("bos_eos" if seen.closes else "bos") if seen.begins else "none"
    payload = seen.context - {"none": 0, "bos": 1, "bos_eos": 2}[special]
    splits = {}
    for name in SPLITS:
        (folder / name).mkdir(parents=True)
        splits[name] = _split(folder / name, foreign[name].kind, pieces[name], seen.column, payload)
    manifest = Manifest(
        format=ADOPTED,
        context=seen.context,
        dtype=seen.dtype.name,
        row_special=special,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocabulary_size=tokenizer.vocabulary_size,
        end_of_text=tokenizer.end_of_text,
        source=foreign["train"].folder.name,
        source_tokens=None,
        held_out=rule,
        options=options,
        train=splits["train"],
        validation=splits["validation"],
    )
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def _split(folder: Path, kind: str, pieces: Sequence[Piece], column: str | None, payload: int) -> Split:
    """Links to the files, and the index."""
    shards, described = list[FileEntry](), list[dict[str, Any]]()
    for number, piece in enumerate(pieces):
        name = f"shard-{number:06d}{piece.path.suffix}"
        os.symlink(piece.path.resolve(), folder / name)
        shards.append(FileEntry(name, piece.bytes, piece.rows, piece.xxh64))
        described.append({"file": name, "first": piece.first, "from": str(piece.path)})
    index = json.dumps({"kind": kind, "column": column, "shards": described}, indent=1, sort_keys=True).encode()
    (folder / "index.json").write_bytes(index)
    rows = sum(piece.rows for piece in pieces)
    documents = sum(piece.ends for piece in pieces)
    return Split(documents, rows * payload, rows, 0, FileEntry("index.json", len(index), 0, xxh64(index)), tuple(shards))
