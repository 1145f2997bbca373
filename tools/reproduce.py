"""The paper's tables, made again by training every system and measuring all of them alike.

    python tools/reproduce.py perplexity [--budget 0.5] [--only ar mdlm] [key=value ...]    # tables 3 and 4
    python tools/reproduce.py zero-shot --set ptb=FILE --set lambada=FILE [key=value ...]     # table 5
    python tools/reproduce.py lengths [--samples 100] [--longest 8192] [key=value ...]        # table 6
    python tools/reproduce.py generation [--samples 50] [--steps 1 4 16 64] [key=value ...]   # table 7
    python tools/reproduce.py single-token [--budget 0.5] [options of tools/study.py]         # table 1
    python tools/reproduce.py schedules [--budget 0.5] [options of tools/study.py]            # tables 2 and 8

The systems are trained by `bd3_scale.train` on one recipe, the objective their only difference, and measured by the code of
`bd3_scale.evaluate` on their last checkpoints. All tables share the runs in --work: whoever comes first trains a system. `--budget`
multiplies the recipe's training.steps; runs of other budgets lie beside. Writes DATE-reproduce-TABLE.{md,json,png} into --out (the last
two tables: DATE-study-TABLE), ours beside the paper's. A stopped command, killed ones too, goes on where it was when given again. Several
calls may work side by side in one --work, each with its own --only; the table is written by the call that finds all systems there.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from reproduce_report import write
from reproduce_systems import ROOT, Runs, System

from bd3_scale import recipe as recipes
from bd3_scale.errors import RecipeError, UserError
from bd3_scale.program import run_program

TABLES = {
    "perplexity": "reproduce_perplexity",
    "zero-shot": "reproduce_zero_shot",
    "lengths": "reproduce_lengths",
    "generation": "reproduce_generation",
}
"""Each module has SYSTEMS, add_options, kept, measure and table."""
STUDIES = ("single-token", "schedules")


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, *STUDIES])
    name = parser.parse_args(words[:1]).table
    try:
        return hand_over(name, words[1:]) if name in STUDIES else reproduce(name, words)
    except UserError as error:
        return error.say("reproduce")


def hand_over(name: str, words: list[str]) -> int:
    """The study of this name, its steps multiplied by the budget."""
    import study

    parser = argparse.ArgumentParser(prog=f"reproduce.py {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--budget", type=float)
    options, others = parser.parse_known_args(words)
    if options.budget is not None:
        if "--steps" in others:
            raise RecipeError("--budget multiplies the study's own steps and --steps sets others; give one of them")
        others += ["--steps", *(str(max(1, round(steps * options.budget))) for steps in study.STUDIES[name][2])]
    status: int = study.main([name, *others])
    return status


def reproduce(name: str, words: list[str]) -> int:
    """Train and measure what is missing, then write the table if nothing is. Raises UserError."""
    module = importlib.import_module(TABLES[name])
    options = _options(name, module, words[1:])
    recipe = recipes.load(options.recipe, options.overrides)
    runs = Runs(options.recipe, options.overrides, max(1, round(recipe.training.steps * options.budget)), options.work)
    for place, system in enumerate(chosen := [system for system in module.SYSTEMS if system.folder in options.only]):
        behind = sum(runs.kept(later, "trained") is None for later in chosen[place + 1 :])
        _measure(module, system, behind, runs, options)
    answers = {system.folder: module.kept(system, runs, options) for system in module.SYSTEMS}
    if missing := [system for system, answer in answers.items() if answer is None]:
        print(f"no table yet: {', '.join(missing)} missing; the same command with --only {' '.join(missing)} makes them")
        return 0
    budget = f"{runs.steps} steps of {recipe.training.global_batch} x {recipe.model.context} tokens"
    about = _about(words, budget, recipes.as_dictionary(recipe))
    print(f"written: {write(name, module.table(list(answers.values()), runs, options), options.out, about)}")
    return 0


def _options(name: str, module: ModuleType, words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"reproduce.py {name}", description=module.__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the recipe, for every system")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "reproduce.yaml")
    parser.add_argument("--budget", type=float, default=1.0, help="multiplies the recipe's training.steps")
    names = [system.folder for system in module.SYSTEMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SYSTEM", help=f"these alone: {', '.join(names)}")
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    module.add_options(parser)
    return parser.parse_intermixed_args(words)


def _measure(module: ModuleType, system: System, behind: int, runs: Runs, options: argparse.Namespace) -> None:
    if module.kept(system, runs, options) is not None:
        return
    with runs.trained(system, behind) as folder:
        if module.kept(system, runs, options) is not None:  # by the call that was waited for
            return
        start = time.perf_counter()
        said = module.measure(system, folder, runs, options)
        print(f"{system.name}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)


def _about(words: list[str], budget: str, recipe: dict[str, Any]) -> dict[str, Any]:
    from benchmark_measure import machine

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=ROOT
    ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "command": " ".join(["python tools/reproduce.py", *words]),
        "machine": machine(),
        "budget": budget,
        "recipe": recipe,
    }


if __name__ == "__main__":
    run_program(main)
