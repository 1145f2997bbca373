"""Tables 3 and 4 of the paper: held-out perplexity of every system, all on the same rows.

Neighbours of the paper's order are compared row by row: what is common to them (hard rows, easy rows) cancels, and the standard error
of the mean difference says what the two perplexities' own errors cannot. Invariant: AR has an exact likelihood and takes one draw.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce_report import Table, cells, logarithmic, number
from reproduce_systems import SYSTEMS as ALL
from reproduce_systems import Runs, System

from bd3_scale.reporting.plots import empty_figure

if TYPE_CHECKING:
    from bd3_scale.data.loader import Rows
    from bd3_scale.distributed.layout import Layout
    from bd3_scale.generation.load_model import LoadedNetwork

SYSTEMS = tuple(system for system in ALL if system.likelihood)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draws", type=int, default=1, help="draws of noise per held-out row of the diffusion models")


def asked(system: System, options: argparse.Namespace) -> dict[str, Any]:
    """What an answer belongs to."""
    return {"draws": 1 if system.overrides == ("objective.kind=ar",) else options.draws}


def kept(system: System, runs: Runs, options: argparse.Namespace) -> dict[str, Any] | None:
    return runs.kept(system, "likelihood", **asked(system, options))


def measure(system: System, folder: Path, runs: Runs, options: argparse.Namespace) -> str:
    """Evaluate and keep the answer; returns what to say of it."""
    from bd3_scale.data.open import open_data
    from bd3_scale.evaluation.world import load_replicas

    loaded, layout = load_replicas(folder)
    recipe = loaded.recipe
    with open_data(recipe.data, recipe.model.context, leader=layout.is_main_rank, barrier=layout.barrier, progress=False) as data:
        answer = likelihood(loaded, layout, data.validation, options.draws)
    runs.keep(system, "likelihood", answer, **asked(system, options))
    return f"perplexity {answer['perplexity']:.3f}"


def likelihood(loaded: LoadedNetwork, layout: Layout, rows: Rows, draws: int, count: int | None = None) -> dict[str, Any]:
    """NELBO of the first `count` rows (None: all), nats per token, row by row and together."""
    from bd3_scale.evaluation.likelihood import evaluate_likelihood

    found = evaluate_likelihood(loaded, rows, layout, count=count, draws=1 if loaded.objective.block_size == 1 else draws)
    return {
        "step": loaded.checkpoint.step,
        "block_size": loaded.objective.block_size,
        "rows": len(found.row_nelbo),
        "exact": found.exact,
        "nelbo": found.nelbo,
        "standard_error": None if len(found.row_nelbo) < 2 else found.standard_error,
        "perplexity": found.perplexity,
        "row_nelbo": found.row_nelbo.tolist(),
    }


def comparisons(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether each system is better than the next one of the paper's order: mean difference of their rows, and its error."""
    ordered = [line for line, system in zip(lines, SYSTEMS, strict=True) if system.ordered]
    found = []
    for better, worse in itertools.pairwise(ordered):
        difference = [b - a for a, b in zip(better["row_nelbo"], worse["row_nelbo"], strict=True)]
        count, mean = len(difference), sum(difference) / len(difference)
        error = math.sqrt(sum((value - mean) ** 2 for value in difference) / max(1, count - 1) / count)
        verdict = "yes" if mean > 2 * error else "not separated" if mean > -2 * error else "no"
        found.append({"expected": f"{better['system']} < {worse['system']}", "difference": mean, "error": error, "holds": verdict})
    return found


def table(lines: list[dict[str, Any]], runs: Runs, options: argparse.Namespace) -> Table:
    rows, compared = [], comparisons(lines)
    for line, system in zip(lines, SYSTEMS, strict=True):
        rows.append([line["system"], number(line["perplexity"], ".3f"), number(_error(line), ".3f"), str(system.lm1b), str(system.owt)])
    orders = [[one["expected"], f"{one['difference']:+.4f}", f"{one['error']:.4f}", one["holds"]] for one in compared]
    text = [
        f"{lines[0]['rows']} held-out rows, {options.draws} draw(s) of noise per row of the diffusion models, whose perplexity is a bound.",
        *cells(["system", "perplexity", "s.e.", "paper: LM1B", "paper: OpenWebText"], rows),
        "Order of the paper (difference in nats per token, rows paired, two standard errors):",
        *cells(["expected", "difference", "s.e.", "holds"], orders),
    ]
    shown = [{key: value for key, value in line.items() if key != "row_nelbo"} for line in lines]
    return Table(shown, text, draw(lines), {"comparisons": compared, "draws": options.draws})


def _error(line: dict[str, Any]) -> float | None:
    return None if line["standard_error"] is None else line["perplexity"] * line["standard_error"]


def draw(lines: list[dict[str, Any]]) -> Any:
    """Perplexity against L'."""
    plot = empty_figure(7, 4.5)
    axes = plot.add_subplot()
    for line in lines:
        error = 2 * (_error(line) or 0.0)
        axes.errorbar(line["block_size"], line["perplexity"], yerr=error, marker="o", linestyle="none", label=line["system"], capsize=3)
    axes.set(xscale="log", xlabel="L' (tokens per block)", ylabel="held-out perplexity (2 s.e.)")
    logarithmic(axes.xaxis, *(line["block_size"] for line in lines))
    axes.legend()
    axes.grid(alpha=0.3)
    return plot
