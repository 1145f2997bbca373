"""Prepare a data folder from text, look into one, or check one.

    bd3 prepare --source documentation --path DATA --context 256
    bd3 prepare --source 'owt/*.jsonl.zst' --validation last:100000 --path DATA --row-special none --workers 16
    bd3 prepare --source corpus.jsonl --path DATA --context 1024 --row-special none --format webdataset
    bd3 prepare --adopt my-copy-c4 --path DATA --tokenizer gpt2
    bd3 prepare --path DATA --inspect 3
    bd3 prepare --path DATA --verify

Sources: `documentation` (docstrings of the installed Python packages), or files, folders and patterns: .jsonl, .ndjson, .json (one object
with a "text" a line), .txt (an empty line ends a document), all also as .gz, .bz2, .xz, .zst; .parquet; folders that `datasets` saved.
Their order is that of the corpus. What is in a folder and cannot be read is an error that names it (--ignore). A killed preparation goes on
with the same command; the result is the same, byte for byte, for any number of processes. Prints for people, or one JSON document with
--json. Exit code 0, or 1 with one line that says why.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bd3_scale.data.counted import ids
from bd3_scale.data.formats.row_reader import ShardReader
from bd3_scale.data.manifest import FORMATS, MANIFEST, PACKINGS, SPLITS, Manifest
from bd3_scale.data.preparation.adopt import adopt
from bd3_scale.data.preparation.documentation import documentation
from bd3_scale.data.preparation.examples import RECORDS
from bd3_scale.data.preparation.packing import HELD_OUT, ROW_SPECIAL
from bd3_scale.data.preparation.prepare import SHARD_BYTES, Packing, prepare
from bd3_scale.data.preparation.prepare_corpus import Corpus, prepare_corpus
from bd3_scale.data.preparation.records import LONGEST
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.errors import DataError, RecipeError, UserError
from bd3_scale.files import expanded
from bd3_scale.messages import show
from bd3_scale.program import run_program
from bd3_scale.recipe.environment import settle
from bd3_scale.recipe.schema import DataConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    defaults = DataConfig()
    parser = argparse.ArgumentParser(prog="bd3 prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, type=Path, help="the data folder")
    parser.add_argument("--source", nargs="+", help="documentation, or files, folders, patterns; without it, the folder is only looked at")
    parser.add_argument(
        "--adopt",
        metavar="FOLDER",
        help="instead: a folder of token ids that another program wrote (MDS, webdataset, Arrow of `datasets`), which stays where it is",
    )
    parser.add_argument("--column", help="of --adopt: where the ids stand (default: tokens or input_ids)")
    parser.add_argument("--context", type=int, help="tokens per row, model.context (default 1024; adopted: those of its first row)")
    parser.add_argument("--tokenizer", help="gpt2, bytes or a `tokenizers` JSON file (default: the folder's, or gpt2)")
    parser.add_argument("--format", choices=FORMATS, default=defaults.format, help="(default %(default)s)")
    parser.add_argument(
        "--row-special", choices=ROW_SPECIAL, default=defaults.row_special, help="special tokens of a row (default %(default)s)"
    )
    parser.add_argument("--tokens", type=int, help=f"prepare at most so many (documentation: {defaults.source_tokens:,}; files: all)")
    parser.add_argument(
        "--validation",
        help=f"what is held out of files: a share of the documents (by a hash of their text), last:N, or a file (default {HELD_OUT})",
    )
    parser.add_argument(
        "--packing",
        choices=PACKINGS,
        help="one stream cut into rows (default), a document a row (prompts: always), or whole documents together in rows",
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: the cores, %(default)s)")
    parser.add_argument("--restart", action="store_true", help="throw away an unfinished preparation with other options")
    parser.add_argument(
        "--records",
        choices=RECORDS,
        default="text",
        help="what a line of JSON is: a text, prompt and response, or messages of a conversation (default %(default)s)",
    )
    parser.add_argument("--text-key", default="text", help="where a line of .jsonl has its text (default %(default)s)")
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN", help="names (or paths) in source folders that are no text of the corpus"
    )
    parser.add_argument("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N bad records, and list them (default 0)")
    parser.add_argument("--longest", type=int, default=LONGEST, metavar="BYTES", help="of a document or a line (default %(default)s)")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="largest size of a shard (default %(default)s)")
    parser.add_argument("--inspect", type=int, metavar="N", default=0, help="print the first N rows of each split as text")
    parser.add_argument("--verify", action="store_true", help="check the size and hash of every file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    if options.adopt is not None and options.source is not None:
        parser.error("--adopt takes tokens and --source takes text; give one of them")
    show()
    try:
        settle()
        report = _run(options)
    except UserError as error:
        return error.say("bd3 prepare")
    print(json.dumps(report) if options.json else _for_people(report))
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    folder = expanded(options.path).absolute()
    if options.adopt is not None:
        tokenizer, rule = load_tokenizer(options.tokenizer or DataConfig().tokenizer), options.validation or str(HELD_OUT)
        manifest = adopt(folder, options.adopt, tokenizer, context=options.context, column=options.column, validation=rule)
    elif options.source is not None:
        manifest = _prepare(folder, options)
    elif (folder / MANIFEST).exists():
        manifest = Manifest.load(folder / MANIFEST)
    else:
        raise DataError(f"{folder}: holds no {MANIFEST}; give --source to prepare it, or --adopt")
    tokenizer = load_tokenizer(options.tokenizer or manifest.tokenizer)
    report: dict[str, Any] = {"path": str(folder), "fingerprint": manifest.fingerprint, **asdict(manifest)}
    for name in SPLITS:
        with ShardReader(folder, name, context=manifest.context, tokenizer=tokenizer, manifest=manifest) as reader:
            if options.verify:
                reader.verify()
            report[name]["shards"] = len(reader.shard_rows)
            report[name]["filling_share"] = manifest.split(name).filling / max(1, len(reader) * manifest.context)
            if options.inspect:
                rows = ids(reader.rows(range(min(options.inspect, len(reader)))))
                report[name]["text"] = [tokenizer.decode(row) for row in rows.tolist()]
    report["verified"] = bool(options.verify)
    return report


def _prepare(folder: Path, options: argparse.Namespace) -> Manifest:
    tokenizer = load_tokenizer(options.tokenizer or DataConfig().tokenizer)
    kind, context = options.packing or ("wrap" if options.records == "text" else "document"), options.context or 1024
    packing = Packing(tokenizer, context, options.row_special, options.format, options.shard_bytes, kind, options.records)
    progress = not options.json
    if options.source == ["documentation"]:
        if options.validation is not None:
            raise RecipeError(f"--validation is {options.validation}; documentation has a rule of its own, leave it out")
        tokens = DataConfig().source_tokens if options.tokens is None else options.tokens
        name = "documentation"
        manifest = prepare(folder, packing, name, tokens, lambda: documentation(tokenizer, tokens, progress=progress))
    else:
        corpus, tokens = _corpus(options), options.tokens
        name = corpus.name
        manifest = prepare_corpus(folder, packing, corpus, workers=options.workers, restart=options.restart, progress=progress)
    manifest.require(folder, context=context, tokenizer=tokenizer)  # it may have been there before
    manifest.require_preparation(folder, format=options.format, row_special=options.row_special, source=name, source_tokens=tokens)
    return manifest


def _corpus(options: argparse.Namespace) -> Corpus:
    some: dict[str, Any] = {"tokens": options.tokens, "ignore": tuple(options.ignore), "skip_bad": options.skip_bad}
    corpus = Corpus(tuple(options.source), options.text_key, longest=options.longest, **some)
    rule = str(HELD_OUT) if options.validation is None else options.validation
    if rule.startswith("last:") and rule.removeprefix("last:").isdecimal():
        return replace(corpus, held_out_last=int(rule.removeprefix("last:")))
    try:
        share = float(rule)
    except ValueError:
        return replace(corpus, held_out_sources=(rule,))
    if not 0 < share < 1:
        raise RecipeError(f"--validation is {rule}; give a share between 0 and 1, last:N, or a file")
    return replace(corpus, held_out=share)


def _for_people(report: dict[str, Any]) -> str:
    lines = [
        f"{report['path']}: {report['format']} rows of {report['context']} tokens ({report['tokenizer']}, {report['row_special']}) "
        f"from {report['source']}"
    ]
    for name in SPLITS:
        split = report[name]
        left = "did not fill a row" if report["packing"] == "wrap" else "were cut off"
        lines.append(
            f"  {name}: {split['rows']:,} rows, {split['tokens']:,} tokens of {split['documents']:,} documents "
            f"({split['dropped_tokens']:,} {left}), {split['shards']} shards"
            + (f", {split['filling_share']:.1%} of the positions are filling" if split["filling"] else "")
        )
        for number, text in enumerate(split.get("text", [])):
            lines.append(f"--- {name} row {number}\n{text}")
    if left_out := report["left_out"]:
        count = f"{len(left_out)} bad record" + "s" * (len(left_out) > 1)
        lines.append(f"  {count} left out (all are in {MANIFEST}), the first: {left_out[0]}")
    if report["verified"]:
        lines.append("  every file has the size and the hash that the manifest says")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
