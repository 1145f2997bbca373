"""A corpus -> a complete data folder, by many processes, and on from where it was killed.

    tokenization.py: documents -> chunk files of token ids          (parallel; finished chunks are kept)
    shard_jobs.py: ranges of those ids -> shards of rows          (parallel; finished shards are kept)
    here:          index, manifest, and the folder gets its name

Rows are packed in one of two ways: `wrap` (packing.py: one stream, cut into rows, remainders carried over) or `document` (a document a
row: a longer one is cut, which the manifest counts, a shorter one filled up with ends of text, which are data tokens like others).

The scratch folder `.NAME.resumable` beside the destination holds options.json, tokens/ (chunks), data/ (what gets the name), entries/ (of
finished shards) and temporary/. Invariants: the folder is byte for byte the same for any number of processes and kills; what lies in the
scratch folder is used only for the very same command on the very same files, and is deleted only after data/ has its name; no token of
`wrap` is lost but those of the last incomplete row of each split, which are counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bd3_scale.data import journal
from bd3_scale.data.formats.mds import xxh64
from bd3_scale.data.lock import exclusive
from bd3_scale.data.manifest import MANIFEST, PACKINGS, SPLITS, FileEntry, Manifest, Split
from bd3_scale.data.preparation import tokenization
from bd3_scale.data.preparation.corpus import corpus_files, require_once, texts
from bd3_scale.data.preparation.packing import HELD_OUT, Packer
from bd3_scale.data.preparation.prepare import Packing, check_shard_bytes, flush
from bd3_scale.data.preparation.shard_jobs import (
    Documents,
    Entry,
    ShardJob,
    index_bytes,
    rows_of_split,
    shard_jobs,
    split_documents,
    write_shard,
)
from bd3_scale.data.preparation.tokenization import Text, tokenize
from bd3_scale.data.preparation.workers import in_order
from bd3_scale.errors import DataError, RecipeError
from bd3_scale.files import sync_directory

OPTIONS = "options.json"
LAYOUT = 2
"""Of the scratch folder: another version of this program does not go on with what it cannot read."""
WORTH_A_PROCESS = 16 << 20
"""Bytes of a corpus that pay for starting a process."""


@dataclass(frozen=True)
class Corpus:
    """What is prepared."""

    sources: tuple[str, ...]
    text_key: str = "text"
    held_out: float = HELD_OUT
    """Share of the documents held out by a hash of their text."""
    held_out_last: int | None = None
    """Instead: the last so many documents."""
    held_out_sources: tuple[str, ...] = ()
    """Instead: the documents of other files."""
    tokens: int | None = None
    """Take at most so many tokens, whole documents, and all of `held_out_sources` besides; None: all."""

    @property
    def name(self) -> str:
        return " + ".join(Path(source).name for source in self.sources)

    @property
    def held_out_rule(self) -> str:
        """What is held out, as the manifest says it."""
        if self.held_out_sources:
            return " + ".join(Path(source).name for source in self.held_out_sources)
        return f"{self.held_out} by a hash of the text" if self.held_out_last is None else f"last:{self.held_out_last}"


def prepare_corpus(
    folder: Path, packing: Packing, corpus: Corpus, *, workers: int, restart: bool = False, progress: bool = True
) -> Manifest:
    """Make `folder` a data folder of `corpus`, unless it is one already; its manifest either way. Raises DataError, RecipeError.

    `restart`: throw away what an unfinished preparation with other options left.
    """
    tokenizer = packing.tokenizer
    packer = Packer(packing.context, tokenizer.vocabulary_size, tokenizer.end_of_text, packing.row_special)  # checks what it is given
    check_shard_bytes(packing, packer.dtype)
    if packing.kind not in PACKINGS:
        raise RecipeError(f"packing is {packing.kind!r}; set {' or '.join(PACKINGS)}")
    if workers < 1:
        raise RecipeError(f"workers is {workers}; take 1 or more processes")
    scratch = folder.with_name(f".{folder.name}.resumable")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_name(f".{folder.name}.lock")):
            if (folder / MANIFEST).exists():
                shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed while it cleared up
                return Manifest.load(folder / MANIFEST)
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise DataError(f"data.path={folder}: holds no {MANIFEST} but is not empty; set data.path to a new folder")
            files, held = corpus_files(corpus.sources), corpus_files(corpus.held_out_sources)
            require_once([*files, *held])
            _resume_or_begin(scratch, _options(packing, corpus, [*files, *held]), restart)
            total = sum(path.stat().st_size for path in [*files, *held])
            workers = min(workers, 1 + total // WORTH_A_PROCESS)
            count = tokenize(
                scratch / "tokens",
                _documents(corpus, files, held),
                tokenizer.name,
                share=corpus.held_out,
                workers=workers,
                budget=corpus.tokens,
                total_bytes=total,
                progress=progress,
            )
            splits = split_documents(scratch / "tokens", count, corpus.tokens, corpus.held_out_last, bool(held))
            manifest = _write(scratch, packing, packer, corpus, splits, workers, progress)
            flush(scratch / "data")
            (scratch / "data").rename(folder)
            sync_directory(folder.parent)
            shutil.rmtree(scratch)
            return manifest
    except OSError as error:
        raise DataError(f"data.path={folder}: cannot be written ({error}); free space or set another data.path") from None


def _documents(corpus: Corpus, files: list[Path], held: list[Path]) -> Iterator[Text]:
    """The files that are held out as a whole, which no budget of tokens cuts, and after them the corpus."""
    for text, place in texts(held, corpus.text_key):
        yield Text(text, True, place)
    before = sum(path.stat().st_size for path in held)
    decided = False if held or corpus.held_out_last is not None else None
    for text, place in texts(files, corpus.text_key):
        yield Text(text, decided, before + place)


def _options(packing: Packing, corpus: Corpus, files: list[Path]) -> dict[str, Any]:
    """Everything that the result depends on."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    tokenizer = packing.tokenizer
    plain = {key: value for key, value in vars(packing).items() if key != "tokenizer"}
    options = {"tokenizer": tokenizer.fingerprint, **plain, **asdict(corpus), "files": stats}
    options |= {"layout": LAYOUT, "chunk_bytes": tokenization.CHUNK_BYTES}
    result: dict[str, Any] = json.loads(json.dumps(options))  # tuples become lists, as they are when read
    return result


def _resume_or_begin(scratch: Path, options: dict[str, Any], restart: bool) -> None:
    """Leave the scratch folder with what may be kept. Raises DataError where that is the work of another command."""
    begun = journal.read(scratch / OPTIONS)
    if not restart and any((scratch / "tokens").glob("chunk-*")):
        other = ["options.json, which is damaged"] if begun is None else [key for key in options if begun.get(key) != options[key]]
        if other == ["files"]:
            raise DataError(f"{scratch}: holds an unfinished preparation of files that have changed since; give --restart to begin anew")
        if other:
            raise DataError(
                f"{scratch}: holds an unfinished preparation with another {other[0]}; give its command again, or --restart to begin anew"
            )
    else:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        journal.write(scratch / OPTIONS, options)
    shutil.rmtree(scratch / "temporary", ignore_errors=True)
    for name in ("temporary", "entries", *(f"data/{split}" for split in SPLITS)):
        (scratch / name).mkdir(parents=True, exist_ok=True)


def _write(
    scratch: Path, packing: Packing, packer: Packer, corpus: Corpus, splits: dict[str, Documents], workers: int, progress: bool
) -> Manifest:
    tokenizer = packing.tokenizer
    rows = {name: rows_of_split(packing, packer, documents) for name, documents in splits.items()}
    for name, documents in splits.items():
        if rows[name] == 0:
            raise DataError(
                f"{corpus.name}: its {name} split has {documents.tokens} tokens in {len(documents.chunk)} documents, too few for one row "
                f"of {packing.context}; give more text, a smaller context or another share of validation"
            )
    written = _entries(list(shard_jobs(scratch, packing, packer, splits)), workers, progress)
    made = {}
    for name, documents in splits.items():
        content = index_bytes(packing.format, [index for _, index in written[name]])
        (scratch / "data" / name / "index.json").write_bytes(content)
        index = FileEntry("index.json", len(content), 0, xxh64(content))
        shards = tuple(entry for entry, _ in written[name])
        wrapped = packing.kind == "wrap"
        kept = rows[name] * packer.payload if wrapped else int(np.minimum(documents.lengths, packer.payload).sum())
        made[name] = Split(len(documents.chunk), documents.tokens, rows[name], documents.tokens - kept, index, shards)
    manifest = Manifest(
        format=packing.format,
        context=packing.context,
        dtype=packer.dtype.name,
        row_special=packing.row_special,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocabulary_size=tokenizer.vocabulary_size,
        end_of_text=tokenizer.end_of_text,
        source=corpus.name,
        source_tokens=corpus.tokens,
        packing=packing.kind,
        held_out=corpus.held_out_rule,
        train=made["train"],
        validation=made["validation"],
    )
    (scratch / "data" / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def _entries(jobs: list[ShardJob], workers: int, progress: bool) -> dict[str, list[Entry]]:
    """Write all shards; their entries by split."""
    entries: dict[str, list[Entry]] = {name: [] for name in SPLITS}
    with (
        tqdm(total=len(jobs), unit="shard", desc="writing", disable=None if progress else True) as bar,
        closing(in_order(write_shard, jobs, min(workers, len(jobs)))) as results,
    ):
        for job, entry in zip(jobs, results, strict=True):
            entries[job.split].append(entry)
            bar.update()
    return entries
