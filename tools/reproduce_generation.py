"""Table 7 of the paper: generative perplexity against network calls (NFE), of every system and several numbers of steps.

Texts have the full length (an end of text does not stop them, as in the paper), once that of the training context and once twice that.
The judge is the AR system of the same folder, or --judge. It reads real held-out text as well: a text below that is not better than real
but poorer, and its entropy tells. Invariant: NFE is what the network counted.
"""

from __future__ import annotations

import argparse
import itertools
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce_report import Table, cells, logarithmic, number, with_error
from reproduce_systems import SYSTEMS, Runs, System, reached_step
from reproduce_texts import add_text_options, make, real, side_by_side

from bd3_scale.errors import RecipeError
from bd3_scale.reporting.plots import empty_figure

if TYPE_CHECKING:
    import torch

    from bd3_scale.evaluation.judge import Judge

__all__ = ["SYSTEMS", "add_options", "kept", "measure", "table"]

FOLDER, PAGE = "texts", "generation.html"
AR = SYSTEMS[0]


def add_options(parser: argparse.ArgumentParser) -> None:
    add_text_options(parser, samples=50, batch=10)
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[1, 4, 16, 64], metavar="T", help="steps per block; of a block of L' tokens those below L'")
    add("--judge", type=Path, metavar="DIR", help="a `transformers` directory or a checkpoint; default: the AR system of --work")
    add(
        "--contexts",
        type=int,
        nargs="+",
        default=[1, 2],
        metavar="C",
        help="lengths of texts in training contexts (default 1 2, as the paper)",
    )


def asked(system: System, runs: Runs, options: argparse.Namespace) -> dict[str, Any]:
    """What an answer belongs to."""
    judge = AR.folder if options.judge is None else str(options.judge.absolute())
    keys = ("samples", "batch_size", "seed", "steps", "contexts")
    return {**{key: getattr(options, key) for key in keys}, "judge": judge, "top_p": system.top_p}


def kept(system: System, runs: Runs, options: argparse.Namespace) -> dict[str, Any] | None:
    return runs.kept(system, "generation", **asked(system, runs, options))


def settings(system: System, block_size: int, steps: list[int]) -> list[dict[str, Any]]:
    """How a system of L' = `block_size` is sampled, from the fewest calls to the most: {"sampler": ..., "steps": T or None}."""
    fewer = [] if system.stepped is None else [T for T in sorted(set(steps)) if system.finest is None or block_size > T]
    found = [{"sampler": system.stepped, "steps": T} for T in fewer]
    if system.finest is not None:
        found.append({"sampler": system.finest, "steps": system.finest_steps(block_size)})
    return found


def measure(system: System, folder: Path, runs: Runs, options: argparse.Namespace) -> str:
    """Make the texts, judge them, keep the numbers; returns what to say of them. Raises RecipeError where there is no judge."""
    from bd3_scale.evaluation.world import load_replicas

    loaded, layout = load_replicas(folder)
    judge = _judge(_place(runs, options), loaded.device)
    context, found = loaded.recipe.model.context, []
    for contexts in options.contexts:
        for setting in settings(system, loaded.objective.block_size, options.steps):
            sampling = {**setting, "length": contexts * context, "stop_at_end_of_text": False}
            document = make(folder / FOLDER, system, loaded, layout, options, judge=judge, **sampling)
            document.pop("lengths")
            found.append({"contexts": contexts, **setting, **document})
            print(f"{system.name}: {_said(found[-1])}", flush=True)
    answer: dict[str, Any] = {"texts": found, "context": context}
    if system is AR:
        answer["real"] = _real(loaded, layout, judge, options)
    runs.keep(system, "generation", answer, **asked(system, runs, options))
    return f"{len(found)} kinds of texts"


def _said(line: dict[str, Any]) -> str:
    steps = "" if line["steps"] is None else f", T = {line['steps']}"
    words = f"{line['options']['length']} tokens, {line['sampler']}{steps}: NFE {line['nfe']:.0f}, generative perplexity "
    return f"{words}{number(line['generative_perplexity_pooled'])}, entropy {number(line['entropy'])}, {line['seconds']:.0f} s"


def _place(runs: Runs, options: argparse.Namespace) -> Path:
    if options.judge is not None:
        judge: Path = options.judge
        return judge
    if reached_step(runs.folder(AR)) != runs.steps:
        raise RecipeError(
            f"the judge is the AR system, which is not trained yet; give the same command with --only {AR.folder}, or --judge"
        )
    return runs.folder(AR)


@lru_cache(maxsize=1)
def _judge(place: Path, device: torch.device) -> Judge:
    from bd3_scale.evaluation.judge import load_judge

    return load_judge(place, device)


def _real(loaded: Any, layout: Any, judge: Judge, options: argparse.Namespace) -> dict[str, Any]:
    from bd3_scale.data.open import open_data

    recipe = loaded.recipe
    with open_data(recipe.data, recipe.model.context, leader=layout.is_main_rank, barrier=layout.barrier, progress=False) as data:
        return real(loaded, judge, data.validation, options.samples)


def table(lines: list[dict[str, Any]], runs: Runs, options: argparse.Namespace) -> Table:
    context, text = lines[0]["context"], []
    truth = lines[0]["real"]
    judge = "the AR system of this table" if options.judge is None else f"`{options.judge.name}`"
    text.append(
        f"{options.samples} texts of each kind, made {options.batch_size} at a time (NFE is that of the batch), nucleus as in the paper's "
        f"scripts ({_nuclei()}; without the token that crosses it). Judge: {judge}; it favours what is written as it writes. Real: "
        f"held-out rows of one context. Low perplexity with low entropy is repetition, not quality. The paper's numbers are those known to "
        "us: 110M parameters, OpenWebText, judged by GPT-2 large, L = 1024 and 2048."
    )
    for contexts in options.contexts:
        text += ["", f"## {contexts} x the context: {contexts * context} tokens"]
        rows = []
        for system, line in zip(SYSTEMS, lines, strict=True):
            *others, finest = _of(line, contexts)
            rows += [_cells(one, system.name, "-") for one in others]
            rows.append(_cells(finest, system.name, system.generation[contexts - 1] if contexts in (1, 2) else "-"))
        rows.append([f"real text, {context} tokens", "-", "-", "-", *_numbers(truth), "-"])
        heads = ["system", "sampler", "T", "NFE", "gen. perplexity, mean of texts", "all tokens pooled", "entropy", "paper (NFE)"]
        text += cells(heads, rows)
    best = [(line["system"], _of(line, options.contexts[0])[-1]["folder"], system) for system, line in zip(SYSTEMS, lines, strict=True)]
    side_by_side(runs.work / PAGE, [(name, runs.folder(system) / FOLDER / folder) for name, folder, system in best])
    text.append(f"Texts with the most steps side by side: `{runs.work / PAGE}`; all of them, with seeds: `samples.jsonl` in `{FOLDER}/*`.")
    return Table(lines, text, draw(lines, truth, options.contexts, context), {"real": truth})


def _nuclei() -> str:
    return "p = " + ", ".join(f"{system.top_p:g} {system.name}" for system in SYSTEMS)


def _of(line: dict[str, Any], contexts: int) -> list[dict[str, Any]]:
    return [one for one in line["texts"] if one["contexts"] == contexts]


def _numbers(one: dict[str, Any]) -> list[str]:
    mean = with_error(one["generative_perplexity"], one.get("generative_perplexity_standard_error"))
    return [mean, number(one["generative_perplexity_pooled"]), number(one["entropy"])]


def _cells(one: dict[str, Any], name: str, paper: str) -> list[str]:
    return [name, one["sampler"], str(one["steps"] or "-"), f"{one['nfe']:.0f}", *_numbers(one), paper]


def draw(lines: list[dict[str, Any]], truth: dict[str, Any], lengths: list[int], context: int) -> Any:
    """Generative perplexity (pooled) against NFE, a panel per length; dotted: real text."""
    plot = empty_figure(5 * len(lengths) + 2, 4.5)
    for axes, contexts in zip(plot.subplots(1, len(lengths), squeeze=False, sharey=True)[0], lengths, strict=True):
        for line, marker in zip(lines, itertools.cycle("osD^vP*"), strict=False):
            points = sorted((one["nfe"], one["generative_perplexity_pooled"]) for one in _of(line, contexts))
            axes.plot(*zip(*points, strict=True), marker=marker, label=line["system"])
        axes.axhline(truth["generative_perplexity_pooled"], color="black", linestyle=":", label="real text")
        axes.set(xscale="log", yscale="log", xlabel="NFE", title=f"{contexts * context} tokens")
        logarithmic(axes.xaxis)
        logarithmic(axes.yaxis)
        axes.label_outer()
        axes.grid(alpha=0.3, which="both")
    plot.supylabel("generative perplexity")
    plot.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return plot
