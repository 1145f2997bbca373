"""Studies by training real runs: what the noise of training does to variance and perplexity. Two are the paper's.

    python tools/study.py single-token [--steps 2000] [key=value ...]    # recipes/study_single_token.yaml
    python tools/study.py schedules [--steps 400] [key=value ...]        # recipes/study.yaml

    python tools/study.py variance [--steps 400] [--seeds 3] [key=value ...]    # recipes/study.yaml; see study_variance.py

`single-token` (Arriola et al. 2025, section 4.1): L' = 1, the next-token loss against block diffusion with t ~ U[1e-3, 1] and
with full masking; with several --steps, at each of these budgets, and at --pair-steps the two that are compared.
`schedules` (section 5, table 8): L' = 4 and 16, every schedule on the whole interval and the paper's clips of the linear one,
a training each; and the 36 clips of the tuner on the network that was trained on linear.
Each writes DATE-study-NAME.{md,json,png} into --out: ours beside the paper's, and whether what was expected came out.

How it is measured. Perplexity: the validation of the run itself (linear weights, t ~ U[1e-3, 1], averaged weights; exact at
L' = 1). Variance: of a block's mean weighted loss under the *training* objective, over blocks and noise, on held-out rows
(see `Noise`). A stopped study goes on where it was when the same command is given again: finished runs in --work are kept.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import study_variance
import torch
from megatron.core import parallel_state

from bd3_scale import recipe as recipes
from bd3_scale import train
from bd3_scale.data.open import open_data
from bd3_scale.distributed import layout as layouts
from bd3_scale.errors import UserError
from bd3_scale.generation.load_model import load_network
from bd3_scale.objectives.network_inputs import block_losses, counted_tokens, masked_counts
from bd3_scale.objectives.noise import LINEAR, Schedule, schedule_named, validation_times
from bd3_scale.program import run_program
from bd3_scale.recipe.objective_kinds import VALIDATION_INTERVAL
from bd3_scale.reporting.metrics import read_metrics
from bd3_scale.reporting.plots import empty_figure
from bd3_scale.rules.objective import interval_candidates
from bd3_scale.rules.validate import validate

RECIPES = Path(__file__).parents[1] / "recipes"
Interval = tuple[float, float]
FULL: Interval = (1.0, 1.0)


@dataclass(frozen=True)
class Arm:
    """One kind of training of a study, and what the paper reports for it (perplexity, variance; None where it says nothing)."""

    name: str
    kind: str = "bd3"
    block_size: int = 1
    schedule: str = "linear"
    interval: Interval = VALIDATION_INTERVAL
    paper: tuple[float | None, float | None] = (None, None)

    @property
    def overrides(self) -> list[str]:
        if self.kind == "ar":
            return ["objective.kind=ar"]
        return [
            f"objective.block_size={self.block_size}",
            f"objective.noise_schedule={self.schedule}",
            f"objective.interval=[{self.interval[0]},{self.interval[1]}]",
        ]

    @property
    def folder(self) -> str:
        return "ar" if self.kind == "ar" else f"L{self.block_size}-{self.schedule}-{self.interval[0]:g}-{self.interval[1]:g}"

    @property
    def noise(self) -> Noise:
        """That of its training; of the next-token loss every token is masked with weight 1."""
        return Noise(schedule_named(self.schedule), FULL if self.kind == "ar" else self.interval)


SINGLE_TOKEN = (
    Arm("AR", kind="ar", paper=(22.88, None)),
    Arm("BD3, t ~ U[0.001, 1]", paper=(25.56, 1.52)),
    Arm("BD3, full masking", interval=FULL, paper=(22.88, 0.11)),
)
PAPER_TABLE_8: dict[int, dict[str, tuple[float, float]]] = {
    4: {
        "linear": (30.18, 23.45),
        "log": (30.36, 23.53),
        "sqrt": (31.41, 26.43),
        "[0.45, 0.95]": (29.21, 6.24),
        "[0.3, 0.8]": (29.38, 10.33),
    },
    16: {
        "linear": (31.72, 7.62),
        "square": (31.43, 13.03),
        "cosine": (31.41, 13.00),
        "[0.45, 0.95]": (31.42, 3.60),
        "[0.3, 0.8]": (31.12, 3.58),
    },
}
CLIPS: tuple[Interval, ...] = ((0.45, 0.95), (0.3, 0.8), (1e-3, 0.5))


def schedule_arms(block_size: int) -> list[Arm]:
    """Every schedule on [1e-3, 1], then the clips of the linear one; the first is linear."""
    paper: dict[str, Any] = PAPER_TABLE_8.get(block_size, {})
    nothing = (None, None)
    whole = [Arm(name, "bd3", block_size, name, paper=paper.get(name, nothing)) for name in ("linear", "log", "sqrt", "square", "cosine")]
    return whole + [Arm(str(list(clip)), "bd3", block_size, "linear", clip, paper.get(str(list(clip)), nothing)) for clip in CLIPS]


# -- Measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """How training masks a block of n tokens: t ~ U[beta, omega], each token with p(t), loss weighted with w(t).

    Given how many of n tokens are masked, which ones they are, and so their nll, does not depend on t. So the moments of
    S * w(t) / n (S: sum of the masked tokens' nll) are sums over counts m of E[S | m], which any noise can measure, times
    integrals over t that are computed here. Drawing t instead would give the same expectation with hardly any digits: the
    draws with t near 1e-3 are rare and carry much of the variance.
    """

    schedule: Schedule
    interval: Interval

    def integrals(self, size: int) -> np.ndarray:
        """E_t[P(m of `size` masked | t) * w(t)^k], float64 [3, size + 1] for k = 0, 1, 2."""
        return _integrals(self.schedule.name, self.interval, size)


@lru_cache(maxsize=1024)
def _integrals(schedule_name: str, interval: Interval, size: int) -> np.ndarray:
    schedule, (beta, omega) = schedule_named(schedule_name), interval
    if beta == omega:
        times, density = np.array([omega]), np.array([1.0])
    else:
        # Gauss-Legendre in log t: smooth although w(t)^2 rises a millionfold towards t = 1e-3.
        nodes, weights = np.polynomial.legendre.leggauss(200)
        half = math.log(omega / beta) / 2
        times = beta * np.exp(half * (nodes + 1))
        density = weights * half * times / (omega - beta)
    p, count = schedule.mask_probability(times)[:, None], np.arange(size + 1)
    ways = np.array([math.comb(size, int(m)) for m in count])
    probability = ways * p**count * (1 - p) ** (size - count)
    powers = schedule.weight(times)[:, None] ** np.arange(3)
    return np.einsum("t,tm,tk->km", density, probability, powers)


@dataclass(frozen=True)
class Measured:
    """A network on held-out rows: of R rows and B blocks each, the masked count and the sum of the masked tokens' nll."""

    masked: np.ndarray
    sums: np.ndarray
    maskable: np.ndarray
    """int64 [B]."""
    drawn: Noise
    """The noise of this pass."""

    def moments(self, noise: Noise) -> tuple[np.ndarray, np.ndarray]:
        """Unbiased for the first and second moment of a block's mean weighted loss under `noise`, float64 [R, B'] each."""
        first, second = [], []
        for block in np.flatnonzero(self.maskable > 0):
            size = int(self.maskable[block])
            drawn, wanted = self.drawn.integrals(size)[0], noise.integrals(size)
            ratio = np.divide(wanted, drawn, out=np.zeros_like(wanted), where=drawn > 0)[:, self.masked[:, block]]
            mean = self.sums[:, block] / size
            first.append(mean * ratio[1])
            second.append(mean**2 * ratio[2])
        return np.stack(first, axis=1), np.stack(second, axis=1)

    def variance(self, noise: Noise) -> tuple[float, float]:
        """Of a block's mean weighted loss under `noise`, and its standard error over rows."""
        first, second = self.moments(noise)
        mean = first.mean()
        influence = (second - 2 * mean * first).mean(1)
        return float(second.mean() - mean**2), float(influence.std(ddof=1) / math.sqrt(len(influence)))

    def row_nelbo(self) -> np.ndarray:
        """NELBO of every row, float64 [R], nats per data token, with the noise of t integrated out."""
        first, _ = self.moments(Noise(LINEAR, FULL if self.maskable.max() == 1 else VALIDATION_INTERVAL))
        maskable = self.maskable[self.maskable > 0]
        return first @ maskable / maskable.sum()


@dataclass(frozen=True)
class Result:
    """A finished training of an arm."""

    arm: Arm
    steps: int
    parameters: int
    curve: list[tuple[int, float]]
    """(step, validation perplexity) of the run."""
    validation: dict[str, Any]
    """The last validation line of its metrics.jsonl."""
    measured: Measured
    direct_variance: float
    """Sample variance of block losses of the very inputs that training would make of these rows: what `Measured` is held to."""


def run(arm: Arm, steps: int, options: argparse.Namespace) -> Result:
    """Train `arm`, then measure what was trained."""
    folder, start = options.work / f"{arm.folder}-{steps}", time.perf_counter()
    layout, curve = trained(folder, steps, arm.overrides, options)
    result = measure(arm, steps, folder, curve, layout, options.draws)
    print(
        f"{arm.folder}, {steps} steps: perplexity {curve[-1]['perplexity']:.3f}, variance {result.measured.variance(arm.noise)[0]:.3f} "
        f"(direct {result.direct_variance:.3f}), {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return result


def trained(folder: Path, steps: int, keys: list[str], options: argparse.Namespace) -> tuple[layouts.Layout, list[dict[str, Any]]]:
    """Train in `folder` the way `python -m bd3_scale.train` does, unless that was done. Returns the validation lines, too."""
    every = max(1, steps // options.points)
    overrides = [*keys, f"training.steps={steps}", f"validation.every={every}", f"run.dir={folder}", *options.overrides]
    recipe = recipes.load(options.recipe, overrides)
    device = recipes.resolve_device(recipe.run.device)
    validate(recipe, 1, device)
    if not parallel_state.model_parallel_is_initialized():
        layouts.start(recipe.parallel, device)
    layout = layouts.current(recipe.parallel, torch.device(device))
    with redirect_stdout(sys.stderr):
        train.train(recipe, layout)
    curve = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "validation"]
    if not curve or curve[-1]["step"] != steps:
        raise UserError(f"the study was stopped in {folder}; the same command goes on from there")
    return layout, curve


@torch.no_grad()
def measure(arm: Arm, steps: int, folder: Path, curve: list[dict[str, Any]], layout: layouts.Layout, draws: int) -> Result:
    loaded = load_network(folder, device=layout.device.type)
    recipe, objective, seed = loaded.recipe, loaded.objective, loaded.recipe.run.seed
    with open_data(recipe.data, recipe.model.context, leader=True, barrier=layout.barrier, progress=False) as data:
        rows = data.validation.rows(np.arange(min(recipe.validation.rows, len(data.validation))))
    indices, batch = np.arange(len(rows)), recipe.micro_batch(1)
    parts = [indices[start : start + batch] for start in range(0, len(rows), batch)]
    blocks = recipe.model.context // objective.block_size
    drawn = Noise(LINEAR, FULL if objective.block_size == 1 else VALIDATION_INTERVAL)
    masked, sums, direct = [], [], []
    maskable = counted_tokens(objective.pattern)
    for part in parts:
        inputs = objective.validation_inputs(rows[part], part, seed)
        losses = block_losses(inputs, loaded.network(inputs.to(layout.device))[1])
        times = np.ones((len(part), blocks)) if objective.block_size == 1 else validation_times(seed, part, blocks)
        masked.append(masked_counts(inputs))
        sums.append(losses * times * maskable)
    for step in range(draws):
        for part in parts:
            inputs = objective.training_inputs(rows[part], part, step, seed, len(rows))
            direct.append(block_losses(inputs, loaded.network(inputs.to(layout.device))[1])[:, maskable > 0])
    return Result(
        arm,
        steps,
        sum(parameter.numel() for parameter in loaded.network.parameters()),
        [(line["step"], line["perplexity"]) for line in curve],
        curve[-1],
        Measured(np.concatenate(masked), np.nan_to_num(np.concatenate(sums)), maskable, drawn),
        float(np.concatenate(direct).var(ddof=1)) if direct else math.nan,
    )


# -- The studies -------------------------------------------------------------------------------------------------------


def row_of(result: Result, common: Measured | None = None) -> dict[str, Any]:
    """One line of a table. `common`: another network, on which this arm's variance is measured, too."""
    variance, error = result.measured.variance(result.arm.noise)
    line = {
        "training": result.arm.name,
        "block_size": result.arm.block_size,
        "steps": result.steps,
        "perplexity": result.validation["perplexity"],
        "nelbo": result.validation["nelbo"],
        "nelbo_standard_error": result.validation["standard_error"],
        "perplexity_integrated": math.exp(result.measured.row_nelbo().mean()),
        "variance": variance,
        "variance_standard_error": error,
        "variance_direct": result.direct_variance,
        "paper_perplexity": result.arm.paper[0],
        "paper_variance": result.arm.paper[1],
        "seconds": result.validation["seconds"],
        "curve": result.curve,
    }
    return line if common is None else {**line, "variance_common": common.variance(result.arm.noise)[0]}


def check(what: str, holds: bool, measured: str) -> dict[str, Any]:
    return {"expected": what, "holds": bool(holds), "measured": measured}


def single_token(options: argparse.Namespace) -> dict[str, Any]:
    lines, checks = [], []
    for steps in sorted({*options.steps, *options.pair_steps}):
        results = [run(arm, steps, options) for arm in SINGLE_TOKEN if steps in options.steps or arm.interval == FULL or arm.kind == "ar"]
        lines += [row_of(result) for result in results]
        auto, *uniform, full = results
        difference = full.measured.row_nelbo() - auto.measured.row_nelbo()
        ratio, error = math.exp(difference.mean()), difference.std(ddof=1) / math.sqrt(len(difference))
        shown = f"{100 * (ratio - 1):+.2f} % +- {100 * error:.2f} (rows paired)"
        checks.append(check(f"{steps} steps: perplexity of full masking within 1 % of AR's", abs(ratio - 1) <= 0.01, shown))
        for other in uniform:
            variances = [result.measured.variance(result.arm.noise)[0] for result in (other, full)]
            times, what = variances[0] / variances[1], f"{steps} steps: variance of full masking at least 5 times below U[0.001, 1]'s"
            checks.append(check(what, times >= 5, f"{times:.1f} times"))
    return {"parameters": auto.parameters, "held_out_rows": len(difference), "rows": lines, "checks": checks}


def schedules(options: argparse.Namespace) -> dict[str, Any]:
    lines: list[dict[str, Any]] = []
    checks, grid = [], {}
    steps = options.steps[-1]
    for block_size in options.block_sizes:
        results = [run(arm, steps, options) for arm in schedule_arms(block_size)]
        common = results[0].measured
        of_size = [row_of(result, common) for result in results]
        lines += of_size
        grid[block_size] = [(interval, *common.variance(Noise(LINEAR, interval))) for interval in interval_candidates(block_size)]
        for key, network in (("variance", "own networks"), ("variance_common", "one network")):
            ours = {line["training"]: line[key] for line in of_size}
            for clip in ("[0.45, 0.95]", "[0.3, 0.8]"):
                shown = f"{ours[clip]:.3g} and {ours['linear']:.3g}"
                checks.append(check(f"L' = {block_size}, {network}: variance of {clip} below linear's", ours[clip] < ours["linear"], shown))
            order = sorted((line for line in of_size if line["paper_variance"]), key=lambda line: line["paper_variance"])
            for low, high in itertools.pairwise(order):
                if high["paper_variance"] > 1.01 * low["paper_variance"]:  # the others are equals in the paper
                    what = f"L' = {block_size}, {network}: the paper's order, {low['training']} below {high['training']}"
                    checks.append(check(what, low[key] < high[key], f"{low[key]:.3g} and {high[key]:.3g}"))
    return {
        "parameters": results[0].parameters,
        "held_out_rows": len(common.masked),
        "rows": lines,
        "checks": checks,
        "clips": [
            {"block_size": size, "interval": list(interval), "variance": variance, "variance_standard_error": error}
            for size, found in grid.items()
            for interval, variance, error in found
        ],
    }


# -- The report --------------------------------------------------------------------------------------------------------

COLUMNS = {
    "steps": "steps",
    "block_size": "L'",
    "training": "training",
    "perplexity": "perplexity",
    "perplexity_integrated": "same, t integrated",
    "variance": "variance",
    "variance_standard_error": "its s.e.",
    "variance_direct": "drawn directly",
    "variance_common": "on one network",
    "paper_perplexity": "paper: perplexity",
    "paper_variance": "paper: variance",
}


def table(lines: Sequence[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    columns = {key: head for key, head in columns.items() if any(line.get(key) is not None for line in lines)}

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:#.4g}" if isinstance(value, float) else str(value)

    head = [f"| {' | '.join(columns.values())} |", f"|{'---|' * len(columns)}"]
    return head + [f"| {' | '.join(cell(line.get(key)) for key in columns)} |" for line in lines]


CHECK = ("expected", "holds", "measured")


def markdown(report: dict[str, Any], picture: str) -> str:
    result, kept = report["result"], [check for check in report["checks"] if check["holds"]]
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    text = [
        f"# study: {report['name']}, {report['date']}",
        "",
        f"Commit {report['commit']}; `{report['command']}`; {sum(line['seconds'] for line in result['rows']):.0f} s of training.",
        f"Machine: {machine}.",
        f"Budget of a training: {report['budget']}. Network: {result['parameters']:,} parameters. {result['held_out_rows']} held-out rows.",
        "",
        *table(result["rows"], result.get("columns", COLUMNS)),
        "",
        result.get("text")
        or "Variance: of a block's mean weighted loss under the training objective, held-out rows, t integrated out; beside it the plain "
        "sample variance of drawn losses, which t near 0.001 makes imprecise. "
        + ("On one network: all objectives on the network trained on linear. " if "clips" in result else "")
        + "The paper's are of a 110M-parameter model on LM1B: orders compare, values do not.",
        "",
        f"![{report['name']}]({picture})",
        "",
        f"Expected, and seen ({len(kept)} of {len(report['checks'])} hold):",
        "",
        *table([{**item, "holds": "yes" if item["holds"] else "no"} for item in report["checks"]], {k: k for k in CHECK}),
    ]
    for size in sorted({clip["block_size"] for clip in result.get("clips", ())}):
        clips = sorted((clip for clip in result["clips"] if clip["block_size"] == size), key=lambda clip: clip["variance"])
        best = "; ".join(f"{clip['interval']} {clip['variance']:.3g}" for clip in clips[:5])
        worst = f"{clips[-1]['interval']} {clips[-1]['variance']:.3g}"
        text += ["", f"Least variance of the tuner's {len(clips)} clips at L' = {size}: {best}; the most: {worst}."]
    return "\n".join(text) + "\n"


def draw(report: dict[str, Any]) -> Any:
    if report["name"] == "variance":
        return study_variance.draw(report["result"])
    sizes = sorted({clip["block_size"] for clip in report["result"].get("clips", ())})
    figure = empty_figure(10, 4 * max(1, len(sizes)))
    panels = figure.subplots(max(1, len(sizes)), 2, squeeze=False)
    if sizes:
        for (left, right), size in zip(panels, sizes, strict=True):
            _draw_schedules(figure, left, right, report["result"], size)
    else:
        _draw_single_token(panels[0, 0], panels[0, 1], report["result"]["rows"])
    return figure


def _draw_single_token(left: Any, right: Any, lines: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    names = list(dict.fromkeys(line["training"] for line in lines))
    longest = {name: max(line["steps"] for line in lines if line["training"] == name) for name in names}
    for line in lines:
        color, last = f"C{names.index(line['training'])}", line["steps"] == longest[line["training"]]
        steps, values = zip(*line["curve"], strict=True)
        left.plot(steps, values, color, linestyle="-" if last else ":", label=line["training"] if last else None)
        left.plot(steps[-1], values[-1], color, marker="o")
    left.set(xlabel="steps", ylabel="validation perplexity (exact)", yscale="log", title="L' = 1")
    left.yaxis.set_major_locator(LogLocator(subs=range(1, 10)))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.legend()
    left.grid(alpha=0.3, which="both")
    every = min(longest.values())  # the longest budget of which there is every arm
    shown = [line for line in lines if line["steps"] == every]
    bars = right.bar(
        [line["training"].replace(", ", ",\n", 1) for line in shown],
        [line["variance"] for line in shown],
        color=[f"C{k}" for k in range(len(shown))],
    )
    right.bar_label(bars, fmt="{:.3g}")
    right.margins(y=0.1)
    right.set(ylabel="variance of a block's loss", title=f"training objective, {every} steps")


def _draw_schedules(figure: Any, left: Any, right: Any, result: dict[str, Any], size: int) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    # A marker and a legend entry each, not a label at the point: trainings with like noise lie side by side.
    lines = [line for line in result["rows"] if line["block_size"] == size]
    for line, marker in zip(lines, itertools.cycle("osD^vPX*"), strict=False):
        point = line["variance"], line["perplexity_integrated"]
        left.plot(*point, linestyle="none", marker=marker, markersize=8, label=line["training"])
    left.set(xlabel="variance of a block's loss", ylabel="perplexity (bound)", xscale="log", title=f"L' = {size}: a training each")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.legend(fontsize=8)
    left.grid(alpha=0.3, which="both")
    clips = [clip for clip in result["clips"] if clip["block_size"] == size]
    beta, omega = zip(*(clip["interval"] for clip in clips), strict=True)
    image = right.scatter(beta, omega, c=[clip["variance"] for clip in clips], s=200, marker="s", cmap="viridis_r", norm=LogNorm())
    ticks = {"ticks": LogLocator(subs=(1, 2, 5)), "format": StrMethodFormatter("{x:g}")}
    figure.colorbar(image, ax=right, label="variance", **ticks).ax.yaxis.set_minor_formatter(NullFormatter())
    right.set(xlabel="beta", ylabel="omega", title=f"L' = {size}: clips of linear, one network")


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    threads = torch.get_num_threads()
    return {"processor": platform.machine(), "cores": os.cpu_count(), "threads": threads, "gpu": gpu, "torch": torch.__version__}


def variance(options: argparse.Namespace) -> dict[str, Any]:
    return study_variance.variance(options, lambda folder, steps, keys: trained(folder, steps, keys, options)[1][-1])


STUDIES = {
    "single-token": (single_token, RECIPES / "study_single_token.yaml", [2000]),
    "schedules": (schedules, RECIPES / "study.yaml", [400]),
    "variance": (variance, RECIPES / "study.yaml", [400]),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the recipe, for every run")
    parser.add_argument("--recipe", type=Path, help="default: the study's own, recipes/study*.yaml")
    parser.add_argument("--steps", type=int, nargs="+", help="steps of every training; several budgets for single-token")
    parser.add_argument("--pair-steps", type=int, nargs="+", default=[], help="of single-token: budgets of AR and full masking alone")
    parser.add_argument("--block-sizes", type=int, nargs="+", help="of schedules and variance")
    parser.add_argument("--seeds", type=int, default=3, help="of variance: trainings of every arm")
    parser.add_argument("--arms", nargs="+", choices=list(study_variance.ARMS), help="of variance: these and the first; default all")
    parser.add_argument("--points", type=int, default=10, help="validations of a training")
    parser.add_argument(
        "--draws", type=int, help="passes over held-out rows for the variance of drawn losses (1); of variance: gradients (64)"
    )
    parser.add_argument("--work", type=Path, help="where the runs lie; default runs/study-NAME")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    options = parser.parse_intermixed_args(arguments)
    study, recipe_path, steps = STUDIES[options.name]
    options.block_sizes = options.block_sizes or ([1, 4, 16, 128] if options.name == "variance" else list(PAPER_TABLE_8))
    options.draws = options.draws or (64 if options.name == "variance" else 1)
    options.steps, options.recipe = options.steps or steps, options.recipe or recipe_path
    options.work = options.work or Path("runs") / f"study-{options.name}"
    try:
        result = study(options)
        recipe = recipes.load(options.recipe, options.overrides)
    except UserError as error:
        return error.say("study")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False).stdout.strip()
    budgets = sorted({*options.steps, *options.pair_steps})
    report = {
        "name": options.name,
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "command": " ".join(["python tools/study.py", *(arguments or sys.argv[1:])]),
        "machine": machine(),
        "budget": f"{' or '.join(map(str, budgets))} steps of {recipe.training.global_batch} x {recipe.model.context} tokens",
        "recipe": recipes.as_dictionary(recipe),
        "checks": result.pop("checks"),
        "result": result,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{report['date']}-study-{options.name}"
    draw(report).savefig(stem.with_suffix(".png"), dpi=90)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report, stem.with_suffix(".png").name))
    print(f"written: {stem.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    run_program(main)
