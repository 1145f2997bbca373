"""What a data folder says about itself: `manifest.json`.

A data folder holds `manifest.json`, `train/` and `validation/`, each with `index.json`, its shards, and `counts.u32` where not every token
counts (`counted`). The manifest names every
other file with its size and xxh64 hash and carries its own checksum, so that whatever is changed in the folder is noticed:
the bytes of the manifest must be exactly those that writing its content again gives. It is written last.

Invariants: packed as `wrap`, `rows * (context - specials) + dropped_tokens == tokens` in each split (its test: test_packing.py);
a file name is a plain name, so no manifest or index can point out of its folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.errors import DataError
from bd3_scale.recipe.definition import KEYS

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
FORMATS = KEYS["data.format"].choices
PACKINGS = ("wrap", "document", "best_fit")
ADOPTED = "adopted"
"""The format of rows that stay in the files of another program, of any whole numbers (preparation/adopt.py)."""
DTYPES = ("uint16", "uint32", "int16", "int32")
DOCUMENT_END = "end_of_text after each document"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
PREPARE_AGAIN = "prepare another folder with bd3 prepare and set data.path to it"


@dataclass(frozen=True)
class FileEntry:
    """A file of a split, by its plain name, with what it must be. `rows` is 0 for the index."""

    file: str
    bytes: int
    rows: int
    xxh64: str


@dataclass(frozen=True)
class Split:
    """One half of the data. `tokens` counts document tokens with the end of text of each; `dropped_tokens` of them are in
    no row: of `wrap` the last ones, which do not fill one, of `document` what was cut off."""

    documents: int
    tokens: int
    rows: int
    dropped_tokens: int
    index: FileEntry
    shards: tuple[FileEntry, ...]
    counts: FileEntry | None = None
    """The file that says of every row how many of its tokens count (little-endian uint32 each); None: all, but token 0."""
    filling: int = 0
    """Positions of the rows that hold filling, which counts nowhere."""


@dataclass(frozen=True)
class Manifest:
    """Everything a reader must know and agree to before it takes a row."""

    format: str
    """mds | webdataset | adopted."""
    context: int
    """L, tokens per row."""
    dtype: str
    """How ids are stored: uint16 | uint32, or int16 | int32 where not every token counts (`counted`); adopted: any whole numbers."""
    row_special: str
    """Special tokens in each row: none | bos | bos_eos."""
    tokenizer: str
    tokenizer_fingerprint: str
    vocabulary_size: int
    """Ids of text, without MASK."""
    end_of_text: int
    source: str
    """Where the text came from."""
    source_tokens: int | None
    """The most tokens that were asked for; None: all of the source."""
    train: Split
    validation: Split
    packing: str = "wrap"
    """wrap (a stream, cut into rows) | document (one in a row, cut or filled up) | best_fit (whole ones together in a row)."""
    records: str = "text"
    """What a record of the source was: text | prompts | messages (whose rows are a prompt and its answer each)."""
    held_out: str = ""
    """The rule by which documents went to validation, for people and for comparing; "" where the source has its own."""
    left_out: tuple[str, ...] = ()
    """Records that could not be read and that --skip-bad allowed for: file, place, what was wrong."""
    options: dict[str, Any] = field(default_factory=dict)
    """What else the preparation was asked for, by the names of the tool's options; {} where nobody wrote it down."""
    document_end: str = DOCUMENT_END
    format_version: int = FORMAT_VERSION

    def split(self, name: str) -> Split:
        """The split called `train` or `validation`."""
        return {"train": self.train, "validation": self.validation}[name]

    def to_bytes(self) -> bytes:
        """The content of manifest.json: the one way of writing this manifest."""
        content = self._content()
        return _written(content, _checksum(content))

    def _content(self) -> dict[str, Any]:
        content = asdict(self)
        for key, before in (("packing", "wrap"), ("records", "text"), ("held_out", ""), ("left_out", ()), ("options", {})):
            if content[key] == before:
                del content[key]  # folders from before there was such a key stay what they were
        for split in (content[name] for name in SPLITS if content[name]["counts"] is None):
            del split["counts"], split["filling"]
        return content

    @property
    def fingerprint(self) -> str:
        """Equal for equal data (the shards' hashes are in it), whatever command made it: ranks and restarts compare it. SHA-256."""
        return _checksum({key: value for key, value in self._content().items() if key != "options"})

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """The manifest in the file `path`. Raises DataError where it is missing, damaged, of another version or nonsense."""
        try:
            stored = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {PREPARE_AGAIN}") from None
        damaged = DataError(f"{path}: is damaged or was edited, its checksum does not fit; delete the folder and prepare it again")
        try:
            content = json.loads(stored)
            claimed = content.pop("checksum")
            if claimed != _checksum(content) or stored != _written(content, claimed):
                raise damaged
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise damaged from None
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: has format version {version}, this program reads {FORMAT_VERSION}; {PREPARE_AGAIN}")
        try:
            train, validation = (_split(content.pop(name), path) for name in SPLITS)
            left_out = tuple(content.pop("left_out", ()))
            manifest = cls(train=train, validation=validation, left_out=left_out, **content)
            manifest._check(path)
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: is not a data manifest ({error}); {PREPARE_AGAIN}") from None
        return manifest

    def _check(self, path: Path) -> None:
        sizes = (self.context, self.vocabulary_size, self.end_of_text)
        adopted = self.format == ADOPTED
        dtypes = (*DTYPES, "uint8", "int8", "int64", "uint64") if adopted else DTYPES
        if self.format not in (*FORMATS, ADOPTED) or self.dtype not in dtypes or any(type(size) is not int or size < 0 for size in sizes):
            raise DataError(f"{path}: has an impossible format, dtype, context or vocabulary; {PREPARE_AGAIN}")
        if self.packing not in PACKINGS or not isinstance(self.held_out, str):
            raise DataError(f"{path}: has an impossible packing or rule of what is held out; {PREPARE_AGAIN}")
        for name in SPLITS:
            held, said = sum(shard.rows for shard in self.split(name).shards), self.split(name).rows
            if said != held:
                raise DataError(f"{path}: says {said} {name} rows, its shards hold {held}; {PREPARE_AGAIN}")
            counts = self.split(name).counts
            uncounted = self.dtype.startswith("int") and not adopted
            if (counts is not None) != uncounted or (counts is not None and counts.bytes != 4 * said):
                raise DataError(f"{path}: does not say which tokens of its {name} rows count; {PREPARE_AGAIN}")

    def require(self, path: Path, *, context: int, tokenizer: Tokenizer) -> None:
        """Raises DataError, naming both values, where the rows (in the folder `path`) are of another context, tokenizer or vocabulary."""
        if self.context != context:
            raise DataError(f"{path}: rows are packed for context {self.context}, the model has model.context {context}; {PREPARE_AGAIN}")
        if self.vocabulary_size != tokenizer.vocabulary_size:
            raise DataError(
                f"{path}: rows are packed with a vocabulary of {self.vocabulary_size} ids ({self.tokenizer}), "
                f"data.tokenizer={tokenizer.name} has {tokenizer.vocabulary_size}; {PREPARE_AGAIN}"
            )
        if self.tokenizer_fingerprint != tokenizer.fingerprint or self.end_of_text != tokenizer.end_of_text:
            raise DataError(
                f"{path}: rows are packed with tokenizer {self.tokenizer} ({self.tokenizer_fingerprint[:12]}), "
                f"data.tokenizer={tokenizer.name} is {tokenizer.fingerprint[:12]}; {PREPARE_AGAIN}"
            )

    def require_preparation(self, path: Path, **asked: object) -> None:
        """Raises DataError, naming both values, where the folder `path` was prepared with other values than `asked` (keys as in data.*).
        What was adopted is of no format of ours, and none is asked of it."""
        for key, wanted in asked.items():
            if key == "format" and self.format == ADOPTED:
                continue
            if (held := getattr(self, key)) != wanted:
                cure = f"set data.path to another folder, or data.{key}={held}"
                raise DataError(f"{path}: was prepared with {key}={held}, asked for is {key}={wanted}; {cure}")


def check_plain_name(name: object, path: Path) -> str:
    """`name`, if it is a plain file name. Raises DataError (found in the file `path`) for anything that could leave its folder."""
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise DataError(f"{path}: names the file {name!r}, which is no plain file name; do not use this folder, {PREPARE_AGAIN}")
    return name


def _split(content: dict[str, Any], path: Path) -> Split:
    index = _file_entry(content.pop("index"), path)
    shards = tuple(_file_entry(shard, path) for shard in content.pop("shards"))
    counts = _file_entry(content.pop("counts"), path) if "counts" in content else None
    if any(type(value) is not int or value < 0 for value in content.values()):
        raise DataError(f"{path}: has a count that is no whole number; {PREPARE_AGAIN}")
    return Split(index=index, shards=shards, counts=counts, **content)


def _file_entry(content: dict[str, Any], path: Path) -> FileEntry:
    entry = FileEntry(**content)
    check_plain_name(entry.file, path)
    if any(type(value) is not int or value < 0 for value in (entry.bytes, entry.rows)) or not isinstance(entry.xxh64, str):
        raise DataError(f"{path}: describes {entry.file} with sizes that are no whole numbers; {PREPARE_AGAIN}")
    return entry


def _written(content: dict[str, Any], checksum: str) -> bytes:
    return (json.dumps({"checksum": checksum, **content}, indent=1, sort_keys=True) + "\n").encode()


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
