"""Table 5 of the paper: perplexity of every system on sets that it was not trained on.

The sets are local files (`--set ptb=FILE`); names, rules and packing are those of bd3_scale/data/preparation/zero_shot.py. Invariant: all
systems read the same rows of a set.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reproduce_perplexity import SYSTEMS, likelihood
from reproduce_report import Table, cells, logarithmic, with_error
from reproduce_systems import Runs, System

from bd3_scale.errors import RecipeError
from bd3_scale.reporting.plots import empty_figure

__all__ = ["SYSTEMS", "add_options", "kept", "measure", "table"]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a set and the file, folder or pattern that holds it; repeat for more",
    )
    add("--rows", type=int, metavar="N", help="the first N rows of every set; default: all")
    add("--draws", type=int, default=1, help="draws of noise per row of the diffusion models")
    add("--cache", type=Path, metavar="FOLDER", help="where the rows of the sets are kept; default ~/.cache/bd3_scale/zero-shot")


def sets(options: argparse.Namespace) -> dict[str, str]:
    """Name -> source. Raises RecipeError for what is no NAME=FILE or no set."""
    from bd3_scale.data.preparation.zero_shot import SETS

    found = {}
    for word in options.set:
        name, _, source = word.partition("=")
        if not source or name not in SETS:
            raise RecipeError(f"--set {word}: write NAME=FILE with one of the names {', '.join(SETS)}")
        found[name] = source
    if not found:
        raise RecipeError(f"no set is named; add --set NAME=FILE with one of the names {', '.join(SETS)}")
    return found


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """What an answer belongs to: the files as they are now, too."""
    from bd3_scale.data.preparation.corpus import corpus_files

    found = sets(options)
    files = {name: [[str(path.absolute()), path.stat().st_mtime_ns] for path in corpus_files([source])] for name, source in found.items()}
    return {"sets": files, "rows": options.rows, "draws": options.draws}


def kept(system: System, runs: Runs, options: argparse.Namespace) -> dict[str, Any] | None:
    return runs.kept(system, "zero-shot", **asked(options))


def measure(system: System, folder: Path, runs: Runs, options: argparse.Namespace) -> str:
    """Evaluate on every set and keep the answers; returns what to say of them."""
    from bd3_scale.data.preparation.zero_shot import CACHE, zero_shot_rows
    from bd3_scale.evaluation.world import load_replicas

    loaded, layout = load_replicas(folder)
    context, special = loaded.recipe.model.context, loaded.recipe.data.row_special
    found = {}
    for name, source in sets(options).items():
        rows = zero_shot_rows(name, source, loaded.tokenizer, context=context, row_special=special, cache=options.cache or CACHE)
        answer = likelihood(loaded, layout, rows, options.draws, options.rows)
        found[name] = {key: value for key, value in answer.items() if key != "row_nelbo"}
    runs.keep(system, "zero-shot", {"perplexities": found}, **asked(options))
    return "perplexity " + ", ".join(f"{name} {one['perplexity']:.2f}" for name, one in found.items())


def table(lines: list[dict[str, Any]], runs: Runs, options: argparse.Namespace) -> Table:
    from bd3_scale.data.preparation.zero_shot import SETS

    names = list(sets(options))
    rows = [[line["system"], *(with_error(*_numbers(line["perplexities"][name])) for name in names)] for line in lines]
    rows.append(["paper: BD3 L' = 4 (OpenWebText)", *(str(SETS[name].paper) for name in names)])
    counts = ", ".join(f"{name} {lines[0]['perplexities'][name]['rows']} rows" for name in names)
    text = [
        f"Perplexity with its standard error, {counts}; {options.draws} draw(s) of noise per row of the diffusion models. Of the paper "
        "the row of BD3 L' = 4 is known to us. Lower than the paper's is no merit where a set resembles the training text.",
        *cells(["system", *names], rows),
    ]
    return Table(lines, text, draw(lines, names), {"paper": {name: SETS[name].paper for name in names}})


def _numbers(answer: dict[str, Any]) -> tuple[float, float | None]:
    error = answer["standard_error"]
    return answer["perplexity"], None if error is None else answer["perplexity"] * error


def draw(lines: list[dict[str, Any]], names: list[str]) -> Any:
    """A group of points per set."""
    plot = empty_figure(max(6.0, 1.6 * len(names) + 3), 4.5)
    axes = plot.add_subplot()
    for place, line in enumerate(lines):
        across = [index + 0.1 * (place - (len(lines) - 1) / 2) for index in range(len(names))]
        numbers = [_numbers(line["perplexities"][name]) for name in names]
        values, errors = [value for value, _ in numbers], [2 * (error or 0.0) for _, error in numbers]
        axes.errorbar(across, values, yerr=errors, marker="o", linestyle="none", label=line["system"], capsize=2)
    axes.set(yscale="log", ylabel="perplexity (2 s.e.)")
    axes.set_xticks(range(len(names)), names)
    logarithmic(axes.yaxis)
    plot.legend(loc="outside right center")
    axes.grid(alpha=0.3, axis="y", which="both")
    return plot
