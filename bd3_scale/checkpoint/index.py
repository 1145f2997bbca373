"""The index of a checkpoint: what it holds, in which file, and how to tell that nothing of it has changed. JSON, format 2.

    {"format": "bd3_scale checkpoint", "format_version": 2, "step": 100, "samples_consumed": 51200,
     "run": {...free-form: tuned interval, wandb id ...}, "versions": {"torch": "2.13.0", ...},
     "files": {"state-00000-of-00002.safetensors": {"bytes": 4096, "sha256": "..."}, ..., "recipe.yaml": {...}},
     "divisions": [[[[0, 1, 2]], [[0, 0, 2]], [[0, 0, 2]], [[64, 0, 2]], [[0, 32, 2]], [[32, 32, 2]]], ...],
     "tensors": {"weight": {"layers.0.norm.weight": {"shape": [64], "parts": 0}}},
     "checksum": "sha256 of the canonical JSON of all other fields"}

`parts` is the number of a division, which says of a tensor's parts in columns (file, dim, offset, size, start, stop; see parts.py) in
which file and region they lie; there each is called by `part_key`. Format 1, which is still read, had an entry for every part.

Invariants: the same state of the same layout gives the same bytes (sorted keys, no time, no host); only "files", "divisions" and
"parts" depend on the layout; the parts of a tensor tile it exactly once; file names are those this package makes, so no index,
however it was made, leads out of its folder. Reading trusts nothing: whatever is not as described is a CheckpointError.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from bd3_scale.checkpoint.parts import Parts, encode, sort, state_name, unpack
from bd3_scale.checkpoint.region import KIND, Region
from bd3_scale.errors import CheckpointError

FORMAT = "bd3_scale checkpoint"
FORMAT_VERSION = 2
INDEX_NAME = "index.json"
RECIPE_NAME = "recipe.yaml"
REGION_FIELDS = ("dim", "offset", "size", "start", "stop")
HEADER_ENTRY = 48
"""Bytes that a part takes in the header of its file, at least."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Tensor:
    """One tensor of one kind: the shape of the unsharded tensor, and the parts that tile it."""

    shape: tuple[int, ...]
    parts: Parts


@dataclass(frozen=True)
class Index:
    """All that index.json says, in Python."""

    step: int
    samples_consumed: int
    run: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileRecord]
    tensors: dict[str, dict[str, Tensor]]
    """kind -> canonical name -> tensor."""


def part_key(kind: str, name: str, region: Region) -> str:
    """The name of a part inside its file: it says by itself what the elements are."""
    return f"{kind}/{name}@" + ",".join(str(getattr(region, field)) for field in REGION_FIELDS)


def build(
    step: int,
    samples_consumed: int,
    run: Mapping[str, Any],
    versions: Mapping[str, str],
    files: Mapping[str, FileRecord],
    packed: Mapping[int, tuple[bytes, bytes]],
) -> Index:
    """The index of what each writer has packed (`parts.pack`). Raises CheckpointError where it does not tile every tensor."""
    if not packed:
        raise CheckpointError("no rank has a tensor to save")
    tensors: dict[str, dict[str, Tensor]] = {}
    alike: dict[tuple[tuple[int, ...], int], Parts] = {}
    tables = unpack(packed)
    for (kind, name), shapes in sorted(tables.items()):
        (shape, table), *others = sorted(shapes.items())
        if others:
            raise CheckpointError(f"{kind} of {name} has shape {list(shape)} on one rank and {list(others[0][0])} on another")
        key = shape, id(table)
        if key not in alike:
            alike[key] = Parts(shape, len(packed), encode(table))
        tensors.setdefault(kind, {})[name] = Tensor(shape, alike[key])
    index = Index(step, samples_consumed, dict(run), dict(versions), dict(files), tensors)
    check_tiling(index)
    return index


def check_tiling(index: Index) -> None:
    """Raise CheckpointError unless the parts of every tensor cover each of its elements exactly once."""
    whole: set[int] = set()
    for kind, names in index.tensors.items():
        for name, tensor in names.items():
            if id(tensor.parts) in whole:
                continue
            try:
                fault = tensor.parts.fault()
            except CheckpointError as error:
                fault = str(error)
            if fault is not None:
                raise CheckpointError(f"the parts of {kind} of {name} {list(tensor.shape)} do not make it up: {fault}")
            whole.add(id(tensor.parts))


def canonical_json(document: Any) -> str:
    """JSON that is the same for equal documents: sorted keys, no spaces, ASCII. Raises ValueError or TypeError for what JSON has not."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def normalise_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """`run` as it will be read again (tuples become lists, keys text), so that saving what was loaded gives the same bytes."""
    try:
        return json.loads(json.dumps(dict(run), allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the run's own entries of a checkpoint must be plain JSON (no NaN, no tensors) but {error}; convert the value"
        ) from error


def render(index: Index) -> bytes:
    """The text of index.json."""
    numbers: dict[str, int] = {}

    def division(parts: Parts) -> int:
        return numbers.setdefault(json.dumps(parts.runs), len(numbers))

    tensors = {
        kind: {name: {"shape": list(tensor.shape), "parts": division(tensor.parts)} for name, tensor in sorted(names.items())}
        for kind, names in sorted(index.tensors.items())
    }
    document: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": index.step,
        "samples_consumed": index.samples_consumed,
        "run": index.run,
        "versions": index.versions,
        "files": {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in index.files.items()},
        "divisions": [json.loads(runs) for runs in numbers],
        "tensors": tensors,
    }
    document["checksum"] = checksum(document)
    return (json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def checksum(document: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of all fields but the checksum."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    return hashlib.sha256(canonical_json(rest).encode("ascii")).hexdigest()


def parse(text: bytes) -> Index:
    """Read index.json. Raises CheckpointError for anything that `render` would not have written; the tiling is not checked here."""
    try:
        document = json.loads(text.decode("ascii"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{INDEX_NAME} is not readable JSON ({error})") from None
    _need(isinstance(document, dict) and document.get("format") == FORMAT, f"{INDEX_NAME} is not the index of a {FORMAT}")
    version = document.get("format_version")
    _need(
        type(version) is int and version in (1, FORMAT_VERSION),
        f"{INDEX_NAME} has format version {version!r}, this program reads 1 to {FORMAT_VERSION}; use the bd3_scale version that wrote it",
    )
    try:
        expected = checksum(document)
    except (ValueError, RecursionError):
        expected = None
    _need(document.get("checksum") == expected, f"{INDEX_NAME} was changed after it was written (its checksum does not match)")
    fields = ("format", "format_version", "step", "samples_consumed", "run", "versions", "files", "tensors", "checksum")
    _fields(document, "index", *fields, *(["divisions"] if version > 1 else []))
    run, versions = document["run"], _mapping(document["versions"], "versions")
    _need(isinstance(run, dict), f"{INDEX_NAME}: run is not a mapping")
    _need(all(isinstance(value, str) for value in versions.values()), f"{INDEX_NAME}: versions are not all text")
    files = {name: _file_record(name, record) for name, record in _mapping(document["files"], "files").items()}
    # The one rule on file names: exactly the names that a save makes, none with a separator.
    writers = sum(name != RECIPE_NAME for name in files)
    expected_names = {RECIPE_NAME, *(state_name(writer, writers) for writer in range(writers))}
    odd = _first(set(files) ^ expected_names)
    _need(set(files) == expected_names, f"{INDEX_NAME}: {odd!r} is not a file of this checkpoint, or is missing from the list")
    divisions = document.get("divisions", [])
    _need(isinstance(divisions, list), f"{INDEX_NAME}: divisions is not a list")
    alike: dict[tuple[int, tuple[int, ...]], Parts] = {}

    def tensor_of(kind: str, name: str, entry: Any) -> Tensor:
        return _tensor_1(kind, name, entry, writers) if version == 1 else _tensor(kind, name, entry, divisions, alike, writers)

    tensors: dict[str, dict[str, Tensor]] = {}
    for kind, names in _mapping(document["tensors"], "tensors").items():
        _need(KIND.fullmatch(kind) is not None, f"{INDEX_NAME}: kind {kind!r} is not a word of small letters")
        tensors[kind] = {name: tensor_of(kind, name, entry) for name, entry in _mapping(names, kind).items()}
    _need(any(tensors.values()), f"{INDEX_NAME}: it lists no tensor")
    held = sum(math.prod(tensor.shape) for names in tensors.values() for tensor in names.values())
    parts = sum(len(tensor.parts) for names in tensors.values() for tensor in names.values())
    _need(
        4 * held + HEADER_ENTRY * parts <= sum(record.bytes for record in files.values()),
        f"{INDEX_NAME}: the tensors have {held} elements in {parts} parts, more than the files have room for",
    )
    return Index(
        step=_count(document["step"], "step"),
        samples_consumed=_count(document["samples_consumed"], "samples_consumed"),
        run=run,
        versions=versions,
        files=files,
        tensors=tensors,
    )


def _tensor(
    kind: str, name: str, entry: Any, divisions: list[Any], alike: dict[tuple[int, tuple[int, ...]], Parts], writers: int
) -> Tensor:
    where = f"{kind} of {name!r}"
    _fields(entry, where, "shape", "parts")
    number, shape = entry["parts"], entry["shape"]
    _need(type(number) is int and 0 <= number < len(divisions), f"{INDEX_NAME}: {where} has no division {number!r}")
    _need(isinstance(shape, list) and all(type(extent) is int for extent in shape), f"{INDEX_NAME}: the shape of {where} is none")
    key = number, tuple(shape)
    if key not in alike:
        try:
            alike[key] = Parts(shape, writers, divisions[number])
        except CheckpointError as error:
            raise CheckpointError(f"{INDEX_NAME}: {where}: {error}") from None
    return Tensor(key[1], alike[key])


def _tensor_1(kind: str, name: str, entry: Any, writers: int) -> Tensor:
    """Of format 1, which has a mapping for each part."""
    where = f"{kind} of {name!r}"
    _fields(entry, where, "shape", "parts")
    _need(isinstance(entry["shape"], list) and isinstance(entry["parts"], list), f"{INDEX_NAME}: shape or parts of {where} is not a list")
    numbers, rows = {state_name(writer, writers): writer for writer in range(writers)}, []
    for part in entry["parts"]:
        _fields(part, f"a part of {where}", "file", "key", "region")
        _fields(part["region"], f"a region of {where}", *REGION_FIELDS)
        try:
            region = Region(tuple(entry["shape"]), *(part["region"][field] for field in REGION_FIELDS))
        except ValueError as error:
            raise CheckpointError(f"{INDEX_NAME}: a part of {where} is impossible: {error}") from None
        _need(region.numel > 0, f"{INDEX_NAME}: a part of {where} is empty")
        _need(isinstance(part["file"], str) and part["file"] in numbers, f"{INDEX_NAME}: {where} lies in no state file {part['file']!r}")
        _need(part["key"] == part_key(kind, name, region), f"{INDEX_NAME}: the key {part['key']!r} is not that of its part of {where}")
        rows.append([numbers[part["file"]], *(getattr(region, field) for field in REGION_FIELDS)])
    _need(len(rows) > 0, f"{INDEX_NAME}: {where} has no parts")
    try:
        return Tensor(region.shape, Parts(region.shape, writers, encode(sort(np.array(rows, np.int64)))))
    except OverflowError:
        raise CheckpointError(f"{INDEX_NAME}: a part of {where} is impossible") from None


def _file_record(name: str, record: Any) -> FileRecord:
    _fields(record, f"file {name!r}", "bytes", "sha256")
    sha256 = record["sha256"]
    _need(isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) is not None, f"{INDEX_NAME}: file {name!r} has no SHA-256")
    return FileRecord(_count(record["bytes"], f"bytes of {name!r}"), sha256)


def _mapping(value: Any, what: str) -> dict[str, Any]:
    _need(isinstance(value, dict), f"{INDEX_NAME}: {what} is not a mapping")
    return value


def _fields(value: Any, what: str, *names: str) -> None:
    _need(isinstance(value, dict), f"{INDEX_NAME}: {what} is not a mapping")
    _need(set(value) == set(names), f"{INDEX_NAME}: {what} has the field {_first(set(value) ^ set(names))!r} too many or too few")


def _count(value: Any, what: str) -> int:
    _need(type(value) is int and value >= 0, f"{INDEX_NAME}: {what} is {value!r}, not a count")
    return value


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def _first(names: set[str]) -> str:
    return min(names, default="")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key stands twice")
    return mapping


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
