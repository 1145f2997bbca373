"""Table 6 of the paper: how long the texts of systems become that may end themselves, beside the documents they were trained on.

A text ends with an end of text, where its last 256 tokens have little entropy (it repeats itself), or at --longest. A system whose rows
are one block (SEDD) has its context and no more, as in the paper. Invariant: lengths are in the model's tokens, without the beginning and
without the end of text; a document that the rows cut is not counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from reproduce_report import Table, cells, logarithmic, number
from reproduce_systems import SYSTEMS as ALL
from reproduce_systems import Runs, System
from reproduce_texts import add_text_options, document_lengths, make, side_by_side

from bd3_scale.reporting.plots import empty_figure

PAPER = {"AR": "4008 / 131K", "SEDD": "1021 / 1024", "BD3 L' = 16": "798 / 9982"}
"""Median / longest of 500 texts of models trained on OpenWebText."""
PAPER_TEXT = "717 / 131K"
SYSTEMS = tuple(system for system in ALL if system.name in PAPER)
FOLDER, PAGE = "texts", "lengths.html"
DOCUMENT_ROWS = 50_000
LONGEST = 64
"""Contexts."""
PAPER_ENTROPY, BYTE_ENTROPY = 4.0, 2.0
"""Nats of 256 tokens below which a text repeats itself. Text has about 3 nats of bytes, so that the paper's number would end it all."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_text_options(parser, samples=100, batch=25)
    add = parser.add_argument
    add("--longest", type=int, metavar="N", help="tokens after which a text is ended; default 64 contexts (the paper: 128, 131072)")
    add("--minimum-entropy", type=float, metavar="H", help="nats, of the last 256 tokens; default: the paper's 4, of bytes 2")


def asked(system: System, options: argparse.Namespace) -> dict[str, Any]:
    """What an answer belongs to."""
    keys = ("samples", "batch_size", "seed", "longest", "minimum_entropy")
    return {**{key: getattr(options, key) for key in keys}, "top_p": system.top_p}


def kept(system: System, runs: Runs, options: argparse.Namespace) -> dict[str, Any] | None:
    return runs.kept(system, "lengths", **asked(system, options))


def measure(system: System, folder: Path, runs: Runs, options: argparse.Namespace) -> str:
    """Make the texts and keep their lengths; returns what to say of them."""
    from bd3_scale.data.open import open_data
    from bd3_scale.evaluation.world import load_replicas
    from bd3_scale.generation.sampler import one_block

    loaded, layout = load_replicas(folder)
    recipe, whole, least = loaded.recipe, one_block(loaded.objective), options.minimum_entropy
    if least is None:
        least = PAPER_ENTROPY if loaded.tokenizer.vocabulary_size > 256 + 1 else BYTE_ENTROPY
    answer = make(
        folder / FOLDER,
        system,
        loaded,
        layout,
        options,
        length=recipe.model.context if whole else options.longest or LONGEST * recipe.model.context,
        sampler=system.finest,
        steps=system.finest_steps(loaded.objective.block_size),
        minimum_entropy=least,
    )
    with open_data(recipe.data, recipe.model.context, leader=layout.is_main_rank, barrier=layout.barrier, progress=False) as data:
        rows = data.validation if data.train.fetches else data.train  # shards that lie elsewhere stay there
        answer["documents"] = document_lengths(loaded, rows, DOCUMENT_ROWS)
    runs.keep(system, "lengths", answer, **asked(system, options))
    return f"median {answer['length_median']:.0f} tokens, longest {answer['length_max']}"


def table(lines: list[dict[str, Any]], runs: Runs, options: argparse.Namespace) -> Table:
    documents, least = lines[0]["documents"], lines[0]["options"]["minimum_entropy"]
    heads = ["system", "median", "longest", "ended by", "at most", "entropy", "paper: median / longest"]
    rows = [["training text", *_of_documents(documents), "-", "-", "-", PAPER_TEXT]]
    for line, system in zip(lines, SYSTEMS, strict=True):
        ends = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in line["stops"].items())
        limit, entropy = str(line["options"]["length"] - 1), number(line["entropy"])
        rows.append([system.name, f"{line['length_median']:.0f}", str(line["length_max"]), ends, limit, entropy, PAPER[system.name]])
    side_by_side(
        runs.work / PAGE,
        [(system.name, runs.folder(system) / FOLDER / line["folder"]) for line, system in zip(lines, SYSTEMS, strict=True)],
    )
    text = [
        f"Tokens of {options.samples} texts per system, which end with an end of text, below {least:g} nats over 256 "
        f'tokens, or at the length "at most"; {len(documents)} whole documents of the training text. The paper\'s numbers are those known '
        "to us: OpenWebText, 500 texts.",
        *cells(heads, rows),
        f"The texts side by side: `{runs.work / PAGE}`.",
    ]
    shown = [{key: value for key, value in line.items() if key != "documents"} for line in lines]
    return Table(shown, text, draw(lines, documents), {"documents": len(documents), "document_lengths": documents})


def _of_documents(documents: list[int]) -> list[str]:
    return [f"{np.median(documents):.0f}", str(max(documents))] if documents else ["-", "-"]


def draw(lines: list[dict[str, Any]], documents: list[int]) -> Any:
    """A histogram per system and one of the documents, on one axis of lengths."""
    panels = {"training text": documents, **{line["system"]: line["lengths"] for line in lines}}
    longest = max((max(lengths) for lengths in panels.values() if lengths), default=1)
    bins = np.unique(np.geomspace(1, longest + 1, 40).round())
    plot = empty_figure(7, 1.8 * len(panels))
    for axes, (name, lengths) in zip(plot.subplots(len(panels), 1, sharex=True), panels.items(), strict=True):
        axes.hist(np.maximum(lengths, 1), bins=bins)
        axes.set(xscale="log", title=name, ylabel="texts")
    axes.set(xlabel="length (tokens)")
    logarithmic(axes.xaxis)
    return plot
