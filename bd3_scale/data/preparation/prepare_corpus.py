"""A corpus -> a complete data folder, by many processes, and on from where it was killed.

    tokenization.py: documents -> chunk files of token ids          (parallel; finished chunks are kept)
    shard_jobs.py: ranges of those ids -> shards of rows          (parallel; finished shards are kept)
    here:          index, manifest, and the folder gets its name

Rows are packed in one of three ways: `wrap` (packing.py: one stream, cut into rows, remainders carried over), `document` (a document a
row: what is too long of it is cut off, which the manifest counts) or `best_fit` (best_fit.py: whole documents together). Rows of the last
two are filled up with ends of text that do not count (counted.py); the manifest says how many, and a file how many tokens of a row count.

The scratch folder (destination.py) holds options.json, tokens/ (chunks), data/ (what the folder will hold), entries/ (of finished shards)
and temporary/. Invariants: the folder is byte for byte the same for any number of processes and kills; what lies in the scratch folder is
used only for the very same command on the very same files; a folder that is there already was made from the same files by the same options,
or the error says what differs; no token of `wrap` is lost but those of the last incomplete row of each split, which are counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bd3_scale.data import journal
from bd3_scale.data.formats.mds import xxh64
from bd3_scale.data.manifest import MANIFEST, PACKINGS, SPLITS, FileEntry, Manifest, Split
from bd3_scale.data.preparation import tokenization
from bd3_scale.data.preparation.corpus import corpus_files, require_once
from bd3_scale.data.preparation.destination import claimed, publish
from bd3_scale.data.preparation.examples import RECORDS, examples
from bd3_scale.data.preparation.packing import HELD_OUT, Packer, held_out
from bd3_scale.data.preparation.prepare import Packing, check_shard_bytes
from bd3_scale.data.preparation.records import LONGEST, BadRecords, require_readable, texts
from bd3_scale.data.preparation.shard_jobs import (
    Documents,
    Entry,
    Plan,
    ShardJob,
    index_bytes,
    shard_jobs,
    split_documents,
    write_shard,
)
from bd3_scale.data.preparation.tokenization import Text, in_parts, tokenize
from bd3_scale.data.preparation.workers import in_order
from bd3_scale.errors import DataError, RecipeError

OPTIONS = "options.json"
LAYOUT = 4
"""Of the scratch folder: another version of this program does not go on with what it cannot read."""
WORTH_A_PROCESS = 16 << 20
"""Bytes of a corpus that pay for starting a process."""
_LOOKED_AT = 1 << 16
"""Bytes at both ends of a file by which another one of the same name and size is known."""


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
    ignore: tuple[str, ...] = ()
    """Patterns of what is no text in folders that are sources."""
    skip_bad: int = 0
    """Bad records that may be left out."""
    longest: int = LONGEST
    """Bytes of the longest document."""

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
    packer = packing.packer  # checks what it is given
    check_shard_bytes(packing, packer.dtype)
    if packing.kind not in PACKINGS:
        raise RecipeError(f"packing is {packing.kind!r}; set {', '.join(PACKINGS[:-1])} or {PACKINGS[-1]}")
    if packing.records not in RECORDS or (packing.records != "text" and packing.kind != "document"):
        raise RecipeError(
            f"records are {packing.records} (one of {', '.join(RECORDS)}) and packing is {packing.kind}, but a prompt with its answer has "
            "a row of its own; set packing document"
        )
    if workers < 1:
        raise RecipeError(f"workers is {workers}; take 1 or more processes")
    with claimed(folder) as scratch:
        files, held = (corpus_files(sources, corpus.ignore) for sources in (corpus.sources, corpus.held_out_sources))
        require_once([*files, *held])
        options = _asked(packing, corpus, [*files, *held])
        if scratch is None:
            manifest = Manifest.load(folder / MANIFEST)
            _require_same(folder, manifest, packing, corpus, options)
            return manifest
        if packing.records == "text":
            require_readable([*files, *held], corpus.text_key, corpus.skip_bad)
        else:
            for path in [*files, *held]:
                next(examples([path], packing.records, tokenizer, BadRecords(corpus.skip_bad)), None)
        try:
            _resume_or_begin(scratch, _options(packing, corpus, [*files, *held]), restart)
            total = sum(path.stat().st_size for path in [*files, *held])
            workers = min(workers, 1 + total // WORTH_A_PROCESS)
            bad = BadRecords(corpus.skip_bad)
            count, whole = tokenize(
                scratch / "tokens",
                _documents(packing, corpus, files, held, bad),
                tokenizer.name,
                share=corpus.held_out,
                workers=workers,
                budget=corpus.tokens,
                total_bytes=total,
                progress=progress,
            )
            splits, read = split_documents(scratch / "tokens", count, corpus.tokens, corpus.held_out_last, bool(held))
            # What processes read ahead of a budget does not count.
            left_out = tuple(text for before, text in bad.found if whole or before < read)
            manifest = _write(scratch, packing, packer, corpus, splits, options, left_out, workers, progress)
            publish(folder)
        except OSError as error:
            raise DataError(f"data.path={folder}: cannot be written ({error}); free space or set another data.path") from None
        finally:
            if not any((scratch / "tokens").glob("chunk-*")):  # nothing to go on with
                shutil.rmtree(scratch, ignore_errors=True)
        return manifest


def _documents(packing: Packing, corpus: Corpus, files: list[Path], held: list[Path], bad: BadRecords) -> Iterator[Text]:
    """The files that are held out as a whole, which no budget of tokens cuts, and after them the corpus."""
    before = sum(path.stat().st_size for path in held)
    decided = False if held or corpus.held_out_last is not None else None
    if packing.records != "text":
        for paths, start, flag in ((held, 0, True), (files, before, decided)):
            for one, place in examples(paths, packing.records, packing.tokenizer, bad, corpus.longest):
                side = held_out(one.record, corpus.held_out) if flag is None else flag
                chat = packing.records == "messages"
                yield Text(one.answer, side, start + place, counted=paths is not held, prompt=one.prompt, chat=chat)
        return
    cut = packing.kind == "wrap" and packing.tokenizer.cuts_between_words  # long ones in parts
    found = chain(
        (Text(text, True, place, counted=False) for text, place in texts(held, corpus.text_key, bad=bad, longest=corpus.longest)),
        (Text(text, decided, before + place) for text, place in texts(files, corpus.text_key, bad=bad, longest=corpus.longest)),
    )
    yield from (part for text in found for part in in_parts(text, corpus.held_out)) if cut else found


def _asked(packing: Packing, corpus: Corpus, files: list[Path]) -> dict[str, Any]:
    """What the manifest remembers of the command besides its own keys, for those who prepare again."""
    content = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            head = file.read(_LOOKED_AT)
            file.seek(-min(_LOOKED_AT, path.stat().st_size), os.SEEK_END)
            content.update(f"{path.name}/{path.stat().st_size}/".encode() + head + file.read())
    return {
        "text_key": corpus.text_key,
        "shard_bytes": packing.shard_bytes,
        "skip_bad": corpus.skip_bad,
        "files": f"{len(files)} of {sum(path.stat().st_size for path in files):,} bytes ({content.hexdigest()[:12]})",
    }


def _require_same(folder: Path, found: Manifest, packing: Packing, corpus: Corpus, options: dict[str, Any]) -> None:
    """The folder that is there was prepared by this command, as far as it says. Raises DataError with the first thing that differs."""
    tokenizer = packing.tokenizer
    if found.packing != "wrap" and not found.dtype.startswith("int"):
        raise DataError(f"{folder}: was prepared when the filling of --packing {found.packing} still counted; give another --path")
    held: dict[str, Any] = {"source": found.source, "validation": found.held_out or corpus.held_out_rule, "packing": found.packing}
    asked: dict[str, Any] = {"source": corpus.name, "validation": corpus.held_out_rule, "packing": packing.kind}
    held["records"], asked["records"] = found.records, packing.records
    held |= {"context": found.context, "format": found.format, "row_special": found.row_special, "tokens": found.source_tokens}
    asked |= {"context": packing.context, "format": packing.format, "row_special": packing.row_special, "tokens": corpus.tokens}
    if found.tokenizer_fingerprint != tokenizer.fingerprint:
        held, asked = held | {"tokenizer": found.tokenizer}, asked | {"tokenizer": f"{tokenizer.name} (another one)"}
    for key, wanted in {**asked, **options}.items():
        if (was := {**options, **found.options, **held}[key]) != wanted:
            name = f"--{key.replace('_', '-')}" if key != "files" else "source files:"
            raise DataError(f"{folder}: was prepared with {name} {was}, asked for is {name} {wanted}; give another --path")


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
    scratch: Path,
    packing: Packing,
    packer: Packer,
    corpus: Corpus,
    splits: dict[str, Documents],
    options: dict[str, Any],
    left_out: tuple[str, ...],
    workers: int,
    progress: bool,
) -> Manifest:
    tokenizer = packing.tokenizer
    plans = {name: Plan.of(documents, packing, packer.payload) for name, documents in splits.items()}
    for name, documents in splits.items():
        if plans[name].rows == 0:
            raise DataError(
                f"{corpus.name}: its {name} split has {documents.tokens} tokens in {documents.count} documents, too few for one row "
                f"of {packing.context}; give more text, a smaller context or another share of validation"
            )
    written = _entries(list(shard_jobs(scratch, packing, packer, plans)), workers, progress)
    made = {}
    for name, plan in plans.items():
        entries, folder = written[name], scratch / "data" / name
        index = _file(folder / "index.json", index_bytes(packing.format, [entry.index for entry in entries]))
        counts = None
        if not packing.all_count:
            counts = _file(folder / "counts.u32", np.concatenate([entry.counts for entry in entries]).astype("<u4").tobytes())
        tokens, filling = plan.documents.tokens, sum(entry.filling for entry in entries)
        shards = tuple(entry.file for entry in entries)
        made[name] = Split(plan.documents.count, tokens, plan.rows, tokens - plan.kept, index, shards, counts, filling)
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
        records=packing.records,
        held_out=corpus.held_out_rule,
        left_out=left_out,
        options=options,
        train=made["train"],
        validation=made["validation"],
    )
    (scratch / "data" / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def _file(path: Path, content: bytes) -> FileEntry:
    path.write_bytes(content)
    return FileEntry(path.name, len(content), 0, xxh64(content))


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
