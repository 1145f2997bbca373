"""Texts of the systems for tables 6 and 7: made once, kept with their seeds, and shown side by side.

Every set of texts has a folder of its own (samples.jsonl, summary.json, lengths.png, page.html) under the run that wrote it; the folder's
name has a hash of what was asked, so that other options never meet its texts. Invariants: texts are made by `generate_texts` of the
package, as by `bd3_scale.evaluate generation`; a folder that a kill left incomplete is made again; the judge reads real text as it reads
generated text: a row's tokens without its first, decoded, with the ends of text that stand in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from reproduce_systems import System

if TYPE_CHECKING:
    from bd3_scale.data.loader import Rows
    from bd3_scale.distributed.layout import Layout
    from bd3_scale.evaluation.judge import Judge
    from bd3_scale.generation.load_model import LoadedNetwork


def add_text_options(parser: argparse.ArgumentParser, samples: int, batch: int) -> None:
    add = parser.add_argument
    add("--samples", type=int, default=samples, metavar="N", help="texts of each kind (default %(default)s; the paper: 300 and 500)")
    add("--batch-size", type=int, default=batch, metavar="B", help="texts made together; NFE is that of the batch (default %(default)s)")
    add("--seed", type=int, default=0)


def make(
    folder: Path,
    system: System,
    loaded: LoadedNetwork,
    layout: Layout,
    options: argparse.Namespace,
    *,
    judge: Judge | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Numbers of texts of a system (see `generation.summary`), of an earlier call where that asked for the same.

    The texts lie in `folder`/FOLDER, where FOLDER is an entry of what is returned. `options`: those of `add_text_options`; `sampling`: the
    others of `generate_tokens`, but for the system's nucleus.
    """
    from bd3_scale.evaluation.generation import generate_texts, summary
    from bd3_scale.evaluation.page import PAGE, SUMMARY, write_results

    samples, batch, seed, sampling = options.samples, options.batch_size, options.seed, {**sampling, **system.nucleus}
    asked = {"samples": samples, "batch_size": batch, "seed": seed, "judge": None if judge is None else judge.name, **sampling}
    digest = hashlib.sha256(json.dumps([asked, loaded.checkpoint.path.name]).encode()).hexdigest()[:8]
    steps = f"-{sampling['steps']}" if sampling.get("steps") else ""
    name = f"{sampling['length']}-{sampling['sampler']}{steps}-{digest}"
    if (folder / name / PAGE).exists():  # written last
        document: dict[str, Any] = json.loads((folder / name / SUMMARY).read_text())
        return document
    shutil.rmtree(folder / name, ignore_errors=True)
    start = time.perf_counter()
    texts = generate_texts(loaded, layout, samples=samples, batch=batch, seed=seed, judge=judge, **sampling)
    document = {**summary(texts), "options": asked, "folder": name, "step": loaded.checkpoint.step, "seconds": time.perf_counter() - start}
    document |= {"judge": asked["judge"], "lengths": [text.length for text in texts]}
    write_results(folder / name, texts, document)
    return document


def real(loaded: LoadedNetwork, judge: Judge, rows: Rows, count: int) -> dict[str, Any]:
    """The same numbers of the first `count` held-out rows, as if they had been generated."""
    from bd3_scale.evaluation.generation import Text, summary
    from bd3_scale.generation.token_sampling import histogram_entropy

    texts = []
    for place, tokens in enumerate(rows.rows(np.arange(min(count, len(rows))))):
        text = loaded.tokenizer.decode(tokens[1:].tolist())
        score = judge.score(text)
        texts.append(Text(place, 0, text, tokens.tolist(), "length", 0, histogram_entropy(tokens[1:]), score.nll, score.tokens))
    return summary(texts)


def document_lengths(loaded: LoadedNetwork, rows: Rows, most: int) -> list[int]:
    """Tokens of the whole documents in the first `most` rows (each without its end of text, as lengths of texts are counted).

    The rows hold documents one after another; what stands before the first end of text and after the last is cut somewhere.
    """
    from bd3_scale.data.preparation.packing import ROW_SPECIAL

    special = loaded.recipe.data.row_special
    start, payload = 0 if special == "none" else 1, loaded.recipe.model.context - ROW_SPECIAL[special]
    stream = rows.rows(np.arange(min(most, len(rows))))[:, start : start + payload].ravel()
    ends = np.flatnonzero(stream == loaded.tokenizer.end_of_text)
    lengths: list[int] = (np.diff(ends) - 1).tolist()
    return lengths


def side_by_side(path: Path, systems: Sequence[tuple[str, Path]]) -> None:
    """A page with the texts of each (name, folder of texts)."""
    from bd3_scale.evaluation.page import page, read_results

    path.write_text(page([(name, *read_results(folder)) for name, folder in systems]), encoding="utf-8")
