"""`python tools/study.py variance`: what ways of drawing the noise do to the variance of loss and gradient, and to what is learned.

An arm is a few keys of a recipe. For every block size and seed each arm is trained for the same number of steps; then its estimators, with
what its tuner found, are all measured on one network, that of the first arm, on the same rows and with fresh noise:

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
from bd3_scale.objectives.density_tuner import LossProfile, count_sums, masked_nll
from bd3_scale.objectives.interval_tuner import TunerState
from bd3_scale.objectives.table import ObjectiveSchedule
from bd3_scale.recipe.objective_kinds import VALIDATION_INTERVAL
from bd3_scale.reporting.plots import empty_figure
from bd3_scale.reporting.reporter import flops_per_token

ARMS: dict[str, list[str]] = {
    "uniform": [],
    "beta [2, 2]": ["objective.density=beta"],
    "pareto [-0.5]": ["objective.density=pareto"],
    "learned density": ["tuner.kind=density"],
    "tuned interval": ["tuner.kind=interval"],
    "both": ["tuner.kind=both"],
}
COLUMNS = {
    "block_size": "L'",
    "training": "noise",
    "bound": "estimates the bound",
    "flops": "FLOPs",
    "nelbo": "NELBO",
    "nelbo_error": "its s.e.",
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
    steps, found, network = options.steps[-1], [], None
    for size in options.block_sizes:
        for seed in range(options.seeds):
            lines: dict[str, dict[str, Any]] = {}
            network = None
            for index, (arm, keys) in enumerate(ARMS.items()):
                folder = options.work / f"L{size}-arm{index}-seed{seed}-{steps}"
                when = [f"tuner.enabled={'tuner' in str(keys)}", f"tuner.every={max(1, steps // 4)}", f"tuner.start_step={steps // 4}"]
                validated = train(folder, steps, [f"objective.block_size={size}", f"run.seed={seed}", *when, *keys])
                if network is None:
                    network = Frozen.of(folder, options)
                lines[arm] = {**network.measure(folder), "nelbo": validated["nelbo"], "seconds": validated["seconds"]}
                print(f"L' = {size}, seed {seed}, {arm}: {json.dumps(lines[arm])}", flush=True)
            found.append((size, lines))
    rows = [_row(size, arm, [lines for of, lines in found if of == size], steps) for size in options.block_sizes for arm in ARMS]
    assert network is not None
    return {
        "parameters": sum(parameter.numel() for parameter in network.loaded.network.parameters()),
        "held_out_rows": len(network.held_out),
        "rows": rows,
        "checks": _checks(rows),
        "columns": COLUMNS,
        "text": TEXT,
    }


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

    def measure(self, folder: Path) -> dict[str, Any]:
        """The estimator that the run in `folder` ended with."""
        checkpoint, network, tokenizer = Checkpoint(locate(folder)), self.loaded.network, self.loaded.tokenizer
        recipe, tuning = read_recipe(checkpoint), TunerState.from_dict(checkpoint.run["tuner"])
        schedule = ObjectiveSchedule.of(recipe, tokenizer.mask_id, tokenizer.end_of_text)
        objective: Any = schedule.at(checkpoint.step - 1, tuning.interval, learned=tuning.density, masked_nll=self.masked_nll)
        parameters = [parameter.requires_grad_() for parameter in network.parameters()]
        losses, controlled, gradients = [], [], []
        for step, rows in enumerate(self.rows):
            inputs = objective.training_inputs(rows, np.arange(len(rows)), step, recipe.run.seed + 1, len(rows))
            tokens = len(rows) * objective.scored_tokens_per_row
            loss = network(inputs.to(self.loaded.device))[0] / tokens
            parts = [one for one in torch.autograd.grad(loss, parameters, allow_unused=True) if one is not None]
            gradients.append(torch.cat([one.flatten() for one in parts]).cpu())
            losses.append(float(loss.detach()))
            controlled.append(losses[-1] - objective.control(inputs, len(rows)) / tokens)
        return {
            "bound": tuple(tuning.interval) == VALIDATION_INTERVAL,
            "flops": flops_per_token(recipe.model, recipe.objective, objective.pattern, tokenizer.model_vocabulary_size, tuning),
            "block_variance": self.profile.variance(objective.times) if tuning.interval[0] < tuning.interval[1] else math.nan,
            "loss_variance": float(np.var(losses, ddof=1)),
            "controlled_variance": float(np.var(controlled, ddof=1)),
            "gradient_variance": float(torch.stack(gradients).double().var(0).sum()),
        }


def _row(size: int, arm: str, seeds: list[dict[str, dict[str, Any]]], steps: int) -> dict[str, Any]:
    """One line of the table: means over seeds, relative to the first arm of the same seed."""
    first = next(iter(ARMS))

    def over_seeds(key: str, relative: bool = True) -> tuple[float, float]:
        values = np.array([lines[arm][key] / (lines[first][key] if relative else 1.0) for lines in seeds])
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan

    row: dict[str, Any] = {"block_size": size, "training": arm, "steps": steps, "bound": "yes" if seeds[0][arm]["bound"] else "no"}
    for key in ("flops", "block_variance", "loss_variance", "gradient_variance"):
        row[key], row[f"{key}_error"] = over_seeds(key)
    row["nelbo"], row["nelbo_error"] = over_seeds("nelbo", relative=False)
    controlled = [lines[arm]["controlled_variance"] / lines[first]["loss_variance"] for lines in seeds]
    return {**row, "controlled_variance": float(np.mean(controlled)), "seconds": sum(lines[arm]["seconds"] for lines in seeds)}


def _checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the densities were made for."""
    found = []
    of = {(row["block_size"], row["training"]): row for row in rows}
    for size in dict.fromkeys(row["block_size"] for row in rows):
        for better, worse in (("learned density", "uniform"), ("both", "tuned interval")):
            one, other = (of[size, arm]["block_variance"] for arm in (better, worse))
            what = f"L' = {size}: variance of a block's loss with {better} below {worse}'s"
            found.append({"expected": what, "holds": bool(one < other), "measured": f"{one:.3f} and {other:.3f} times uniform's"})
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
