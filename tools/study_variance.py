"""`python tools/study.py variance`: what ways of drawing the noise do to the variance of loss and gradient, and to what is learned.

An arm is a few keys of a recipe. For every block size and seed each arm is trained for the same number of steps, or, where its name says
so, for as many as have the same FLOPs; then its estimators, with what its tuner found, are all measured on one network, that of the first
arm, on the same rows and with fresh noise (a step has equally many noisy rows in all arms):

- variance of a block's loss: of one block, exact over t and masks (`LossProfile`), of the bound itself or of a clipped one;
- variance of a step's loss, with and without the control variate, and of its gradient (trace of the covariance over all parameters);
- FLOPs of a step, relative to the first arm's.

Numbers are means over seeds, with standard errors of these means; variances relative to the first arm's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.checkpoint.store import locate
from bd3_scale.data.open import open_data
from bd3_scale.generation.load_model import LoadedNetwork, load_network, read_recipe
from bd3_scale.objectives.loss_profile import LossProfile, count_sums, masked_nll
from bd3_scale.objectives.table import ObjectiveSchedule
from bd3_scale.objectives.time_density import TimeDensity
from bd3_scale.recipe.objective_kinds import VALIDATION_INTERVAL
from bd3_scale.reporting.plots import empty_figure
from bd3_scale.reporting.reporter import flops_per_token
from bd3_scale.tuning.interval_tuner import TunerState

ARMS: dict[str, list[str]] = {
    "uniform": [],
    "beta [2, 2]": ["objective.density=beta"],
    "pareto [-0.5]": ["objective.density=pareto"],
    "learned density": ["tuner.kind=density"],
    "tuned interval": ["tuner.kind=interval"],
    "both": ["tuner.kind=both"],
    "2 draws": ["objective.draws=2"],
    "2 draws, complement": ["objective.draws=2", "objective.pairs=complement"],
    "2 draws, antithetic": ["objective.draws=2", "objective.pairs=antithetic"],
    "4 draws": ["objective.draws=4"],
    "2 draws, equal FLOPs": ["objective.draws=2"],
    "4 draws, equal FLOPs": ["objective.draws=4"],
    "mixture": [],
}
EQUAL_FLOPS = {"2 draws, equal FLOPs": "2 draws", "4 draws, equal FLOPs": "4 draws"}
"""Arm -> the one that has its keys and as many steps as the others."""
MIXTURE = "mixture"
"""One training with all block sizes, in equal shares, measured at each."""
FIRST = next(iter(ARMS))
COLUMNS = {
    "block_size": "L'",
    "training": "noise",
    "steps": "steps",
    "bound": "estimates the bound",
    "flops": "FLOPs",
    "nelbo": "NELBO",
    "nelbo_error": "its s.e.",
    "nelbo_difference": "less uniform's",
    "nelbo_difference_error": "its s.e.",
    "block_variance": "variance of a block",
    "loss_variance": "of a step",
    "controlled_variance": "controlled",
    "gradient_variance": "of the gradient",
    "gradient_variance_error": "its s.e.",
}
TEXT = (
    "NELBO: after a training each, nats per data token on held-out rows; its s.e. is over seeds. Variances: of each arm's estimator on the "
    "network trained with uniform t, relative to uniform t's. FLOPs of a step likewise."
)
Train = Callable[[Path, int, list[str]], dict[str, Any]]


def variance(options: argparse.Namespace, train: Train) -> dict[str, Any]:
    """The study. `train`: (folder, steps, overrides) -> the last validation line of a run."""
    budget, found, network = options.steps[-1], [], None
    arms = [arm for arm in ARMS if arm in (*(options.arms or ARMS), FIRST) and (arm != MIXTURE or len(options.block_sizes) > 1)]
    for size in options.block_sizes:
        for seed in range(options.seeds):
            lines: dict[str, dict[str, Any]] = {}
            network = None
            for arm in arms:
                keys, sizes, steps = ARMS[arm], str(size), budget
                if arm in EQUAL_FLOPS:
                    steps = round(budget * lines[FIRST]["flops"] / lines[EQUAL_FLOPS[arm]]["flops"])
                folder = options.work / f"L{size}-arm{list(ARMS).index(arm)}-seed{seed}-{steps}"
                if arm == MIXTURE:
                    folder, sizes = options.work / f"mixture-seed{seed}-{steps}", _equal_shares(options.block_sizes)
                when = [f"tuner.enabled={'tuner' in str(keys)}", f"tuner.every={max(1, steps // 4)}", f"tuner.start_step={steps // 4}"]
                validated = train(folder, steps, [f"objective.block_size={sizes}", f"run.seed={seed}", *when, *keys])
                if network is None:
                    network = Frozen.of(folder, options)
                nelbo = (validated["block_sizes"][str(size)] if arm == MIXTURE else validated)["nelbo"]
                lines[arm] = {**network.measure(folder, size), "nelbo": nelbo, "seconds": validated["seconds"], "steps": steps}
                print(f"L' = {size}, seed {seed}, {arm}: {json.dumps(lines[arm])}", flush=True)
            found.append((size, lines))
    rows = [_row(size, arm, [lines for of, lines in found if of == size]) for size in options.block_sizes for arm in arms]
    assert network is not None
    return {
        "parameters": sum(parameter.numel() for parameter in network.loaded.network.parameters()),
        "held_out_rows": len(network.held_out),
        "rows": rows,
        "checks": _checks(rows),
        "columns": COLUMNS,
        "text": TEXT,
    }


def _equal_shares(sizes: list[int]) -> str:
    """A mixture, as a recipe has it; shares have four decimals, and the first takes what is left."""
    share = round(1 / len(sizes), 4)
    shares = [round(1 - share * (len(sizes) - 1), 4)] + [share] * (len(sizes) - 1)
    return "{" + ", ".join(f"{size}: {share}" for size, share in zip(sizes, shares, strict=True)) + "}"


@dataclass(frozen=True)
class Frozen:
    """A trained network, on which the estimators of all arms are measured."""

    loaded: LoadedNetwork
    held_out: np.ndarray
    rows: np.ndarray
    """int64 [draws, global batch, L]: of training."""
    profile: LossProfile
    masked_nll: tuple[float, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, folder: Path, options: argparse.Namespace) -> Frozen:
        """Of a finished run."""
        loaded = load_network(folder, device="cuda" if torch.cuda.is_available() else "cpu")
        recipe, objective, batch = loaded.recipe, loaded.objective, loaded.recipe.batches.rows_at(0)
        with open_data(recipe.data, recipe.model.context, leader=True, barrier=lambda: None, progress=False) as data:
            held_out = data.validation.rows(np.arange(min(recipe.validation.rows, len(data.validation))))
            rows = data.train.rows(np.arange(options.draws * batch) % len(data.train)).reshape(options.draws, batch, -1)
        sums = 0.0
        for part in np.array_split(np.arange(len(held_out)), math.ceil(len(held_out) / batch)):
            inputs = objective.validation_inputs(held_out[part], part, recipe.run.seed)
            nll = loaded.network(inputs.to(loaded.device))[1]
            sums = sums + count_sums(objective.block_samples(inputs, nll, part, recipe.run.seed)).sum(0)
        profile = LossProfile.of(np.asarray(sums), objective.block_size)
        assert profile is not None, "a study has more held-out rows"
        return cls(loaded, held_out, rows, profile, masked_nll(np.asarray(sums)))

    def measure(self, folder: Path, size: int) -> dict[str, Any]:
        """The estimator that the run in `folder` ended with, at block size `size`."""
        checkpoint, network, tokenizer = Checkpoint(locate(folder)), self.loaded.network, self.loaded.tokenizer
        recipe = read_recipe(checkpoint)
        tuning = TunerState.from_dict(checkpoint.run["tuner"]).at(size, recipe.objective.interval)
        schedule, batch = ObjectiveSchedule.of(recipe, tokenizer.mask_id, tokenizer.end_of_text), recipe.batches.rows_at(0)
        objective: Any = schedule.of_size(size, tuning.interval, learned=tuning.density, masked_nll=self.masked_nll)
        parameters = [parameter.requires_grad_() for parameter in network.parameters()]
        losses, controlled, gradients = [], [], []
        for step, rows in enumerate(self.rows[:, :batch]):
            inputs = objective.training_inputs(rows, np.arange(len(rows)), step, recipe.run.seed + 1, len(rows))
            tokens = len(rows) * objective.scored_tokens_per_row
            loss = network(inputs.to(self.loaded.device))[0] / tokens
            parts = [one for one in torch.autograd.grad(loss, parameters, allow_unused=True) if one is not None]
            gradients.append(torch.cat([one.flatten() for one in parts]).cpu())
            losses.append(float(loss.detach()))
            controlled.append(losses[-1] - objective.control(inputs, len(rows)) / tokens)
        return {
            "bound": tuple(tuning.interval) == VALIDATION_INTERVAL,
            "flops": batch * flops_per_token(recipe.model, recipe.objective, objective.pattern, tokenizer.model_vocabulary_size, tuning),
            "block_variance": self.profile.variance(objective.times) if tuning.interval[0] < tuning.interval[1] else math.nan,
            "best_variance": self._best_variance(objective.times),
            "loss_variance": float(np.var(losses, ddof=1)),
            "controlled_variance": float(np.var(controlled, ddof=1)),
            "gradient_variance": float(torch.stack(gradients).double().var(0).sum()),
        }

    def _best_variance(self, drawn: TimeDensity) -> float:
        """Of a block's loss with the best density on its interval, over that with `drawn`; the tuner keeps what is within its margin."""
        if drawn.interval[0] == drawn.interval[1]:
            return math.nan
        return self.profile.variance(self.profile.best(drawn.interval)) / self.profile.variance(drawn)


def _row(size: int, arm: str, seeds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One line of the table: means over seeds, relative to the first arm of the same seed."""

    def over_seeds(key: str, relative: bool = True) -> tuple[float, float]:
        values = np.array([lines[arm][key] / (lines[FIRST][key] if relative else 1.0) for lines in seeds])
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan

    row: dict[str, Any] = {
        "block_size": size,
        "training": arm,
        "steps": seeds[0][arm]["steps"],
        "bound": "yes" if seeds[0][arm]["bound"] else "no",
    }
    for key in ("flops", "block_variance", "loss_variance", "gradient_variance"):
        row[key], row[f"{key}_error"] = over_seeds(key)
    row["nelbo"], row["nelbo_error"] = over_seeds("nelbo", relative=False)
    differences = np.array([lines[arm]["nelbo"] - lines[FIRST]["nelbo"] for lines in seeds])
    row["nelbo_difference"] = float(differences.mean())
    row["nelbo_difference_error"] = float(differences.std(ddof=1) / math.sqrt(len(seeds))) if len(seeds) > 1 else math.nan
    row["best_variance"], _ = over_seeds("best_variance", relative=False)
    controlled = [lines[arm]["controlled_variance"] / lines[FIRST]["loss_variance"] for lines in seeds]
    return {**row, "controlled_variance": float(np.mean(controlled)), "seconds": sum(lines[arm]["seconds"] for lines in seeds)}


def _checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the densities were made for."""
    found = []
    of = {(row["block_size"], row["training"]): row for row in rows}
    for size in dict.fromkeys(row["block_size"] for row in rows):
        if (learned := of.get((size, "learned density"))) is not None:
            what, ratio = f"L' = {size}: variance of a block's loss with the learned density below uniform's", learned["block_variance"]
            found.append({"expected": what, "holds": bool(ratio < 1), "measured": f"{ratio:.3f} of it"})
        if (tuned := of.get((size, "tuned interval"))) is not None and not math.isnan(tuned["best_variance"]):
            what, ratio = f"L' = {size}: and with the best density on the tuned interval below uniform's on it", tuned["best_variance"]
            found.append({"expected": what, "holds": bool(ratio < 1), "measured": f"{ratio:.3f} of it"})
    return found


def draw(result: dict[str, Any]) -> Any:
    """Of every block size: variance of the gradient beside the NELBO, an arm each."""
    sizes = list(dict.fromkeys(row["block_size"] for row in result["rows"]))
    figure = empty_figure(10, 3.5 * len(sizes))
    for size, (left, right) in zip(sizes, figure.subplots(len(sizes), 2, squeeze=False), strict=True):
        rows = [row for row in result["rows"] if row["block_size"] == size]
        names = [row["training"] for row in rows]
        left.barh(names, [row["gradient_variance"] for row in rows], xerr=[np.nan_to_num(row["gradient_variance_error"]) for row in rows])
        left.set(xlabel="variance of the gradient, relative", title=f"L' = {size}")
        right.errorbar([row["nelbo"] for row in rows], names, xerr=[np.nan_to_num(row["nelbo_error"]) for row in rows], fmt="o")
        right.set(xlabel="NELBO after training", yticks=[])
        left.invert_yaxis()
        right.invert_yaxis()
    return figure
