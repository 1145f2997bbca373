"""Documents -> a complete data folder, or nothing.

Invariant: a preparation that is killed leaves nothing that a reader would take for data, and its remains go with the next one
(destination.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bd3_scale.data.formats.row_reader import WRITERS, RowWriter
from bd3_scale.data.manifest import MANIFEST, SPLITS, Manifest, Split
from bd3_scale.data.preparation.destination import CONTENT, claimed, publish
from bd3_scale.data.preparation.packing import Document, Packer
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.errors import DataError, RecipeError

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
    """wrap | document | best_fit (prepare_corpus.py)."""
    records: str = "text"
    """What a record of the corpus is: text | prompts | messages (examples.py)."""

    @property
    def all_count(self) -> bool:
        """Whether every token of the rows counts: `wrap` has no filling."""
        return self.kind == "wrap"

    @property
    def packer(self) -> Packer:
        """Of its rows. Raises RecipeError where they leave no room for text."""
        tokenizer = self.tokenizer
        return Packer(self.context, tokenizer.vocabulary_size, tokenizer.end_of_text, self.row_special, self.all_count)


def prepare(folder: Path, packing: Packing, source: str, source_tokens: int | None, documents: Documents) -> Manifest:
    """Make `folder` a data folder of `documents()`, unless it is one already; its manifest either way.

    `source` and `source_tokens` are written down for readers. Raises DataError where the folder holds other things, where it cannot
    be written, and where there is too little text for one row of each split; RecipeError for packing other than `wrap`.
    """
    if packing.kind != "wrap":
        raise RecipeError(f"{source} is packed as wrap only, asked for is packing {packing.kind}; prepare a file for that")
    with claimed(folder) as scratch:
        if scratch is None:
            return Manifest.load(folder / MANIFEST)
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed; the lock is ours
        try:
            manifest = _write(scratch / CONTENT, packing, source, source_tokens, documents)
            publish(folder)
        except OSError as error:
            raise DataError(f"data.path={folder}: cannot be written ({error}); free space or set another data.path") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return manifest


def _write(folder: Path, packing: Packing, source: str, source_tokens: int | None, documents: Documents) -> Manifest:
    tokenizer = packing.tokenizer
    packers = {name: packing.packer for name in SPLITS}
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
