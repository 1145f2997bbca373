"""Documents -> a complete data folder, or nothing.

Everything is written into a scratch folder beside the destination, flushed to the disk and renamed when it is complete.
Invariants: a preparation that is killed leaves nothing that a reader would take for data, and its remains go with the next one;
two processes that prepare one folder at once do not disturb each other: one works, the other waits and finds the work done;
a folder that holds anything is never overwritten.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bd3_scale.data.formats.row_reader import WRITERS, RowWriter
from bd3_scale.data.lock import exclusive
from bd3_scale.data.manifest import MANIFEST, SPLITS, Manifest, Split
from bd3_scale.data.preparation.packing import Document, Packer
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.errors import DataError, RecipeError
from bd3_scale.files import sync_directory

Documents = Callable[[], Iterable[Document]]
SHARD_BYTES = 1 << 24
"""Default size of a shard. Small enough to fetch and check in a fraction of a second, and for a window of 16 to mix 128 M GPT-2 tokens."""


@dataclass(frozen=True)
class Packing:
    """How documents become rows and files."""

    tokenizer: Tokenizer
    context: int
    row_special: str = "bos"
    format: str = "mds"
    shard_bytes: int = SHARD_BYTES
    kind: str = "wrap"
    """wrap | document (prepare_corpus.py)."""


def prepare(folder: Path, packing: Packing, source: str, source_tokens: int | None, documents: Documents) -> Manifest:
    """Make `folder` a data folder of `documents()`, unless it is one already; its manifest either way.

    `source` and `source_tokens` are written down for readers. Raises DataError where the folder holds other things, where it cannot
    be written, and where there is too little text for one row of each split; RecipeError for packing other than `wrap`.
    """
    if packing.kind != "wrap":
        raise RecipeError(f"{source} is packed as wrap only, asked for is packing {packing.kind}; prepare a file for that")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.path={folder}: its parent cannot be created ({error.strerror}); set another data.path") from None
    with exclusive(folder.with_name(f".{folder.name}.lock")):
        if (folder / MANIFEST).exists():
            return Manifest.load(folder / MANIFEST)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"data.path={folder}: holds no {MANIFEST} but is not empty; set data.path to a new folder")
        scratch = folder.with_name(f".{folder.name}.preparing")
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed; the lock is ours
        try:
            manifest = _write(scratch, packing, source, source_tokens, documents)
            flush(scratch)
            scratch.rename(folder)
            sync_directory(folder.parent)
        except OSError as error:
            raise DataError(f"data.path={folder}: cannot be written ({error}); free space or set another data.path") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return manifest


def _write(folder: Path, packing: Packing, source: str, source_tokens: int | None, documents: Documents) -> Manifest:
    tokenizer = packing.tokenizer
    packers = {name: Packer(packing.context, tokenizer.vocabulary_size, tokenizer.end_of_text, packing.row_special) for name in SPLITS}
    dtype = packers["train"].dtype.name
    check_shard_bytes(packing, packers["train"].dtype)
    writers: dict[str, RowWriter] = {}
    splits: dict[str, Split] = {}
    try:
        for name in SPLITS:
            (folder / name).mkdir(parents=True)
            writers[name] = WRITERS[packing.format](folder / name, packing.context, dtype, packing.shard_bytes)
        for document in documents():
            name = "validation" if document.held_out else "train"
            rows = packers[name].add(document.tokens)
            if len(rows):
                writers[name].write(rows)
        for name in SPLITS:
            if packers[name].rows == 0:
                raise DataError(
                    f"{source}: its {name} split has {packers[name].tokens} tokens in {packers[name].documents} documents, too few for "
                    f"one row of {packing.context}; give more text, a smaller context or another share of validation"
                )
        for name in SPLITS:
            index, shards = writers.pop(name).finish()
            packed = packers[name]
            splits[name] = Split(packed.documents, packed.tokens, packed.rows, packed.dropped_tokens, index, shards)
    finally:
        for writer in writers.values():
            writer.abort()
    manifest = Manifest(
        format=packing.format,
        context=packing.context,
        dtype=dtype,
        row_special=packing.row_special,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocabulary_size=tokenizer.vocabulary_size,
        end_of_text=tokenizer.end_of_text,
        source=source,
        source_tokens=source_tokens,
        train=splits["train"],
        validation=splits["validation"],
    )
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def check_shard_bytes(packing: Packing, dtype: np.dtype) -> None:
    """Raises RecipeError for shards that hold no two rows, or that the formats cannot address."""
    row_bytes = packing.context * dtype.itemsize
    if not 2 * row_bytes + 4096 <= packing.shard_bytes < 1 << 31:
        limits = f"take {2 * row_bytes + 4096} to {(1 << 31) - 1}"
        raise RecipeError(f"shards of {packing.shard_bytes} bytes do not suit rows of {row_bytes} bytes; {limits}")


def flush(folder: Path) -> None:
    """Everything below `folder` is on the disk before its name says that it is complete."""
    for parent, _, files in os.walk(folder):
        for file in files:
            descriptor = os.open(Path(parent) / file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(parent))
