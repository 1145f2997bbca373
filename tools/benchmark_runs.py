"""A trained checkpoint: decoding with the cache against without, and the tuner's pass against a plain validation."""

from __future__ import annotations

import argparse
import statistics as statistics_module
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from benchmark_measure import alternate, paired_ratio
from torch import Tensor

from bd3_scale.distributed import layout as layouts
from bd3_scale.objectives.network_inputs import NetworkInputs, block_losses
from bd3_scale.objectives.noise import validation_times
from bd3_scale.objectives.table import BlockDiffusion, MaskedDiffusion
from bd3_scale.tuning.interval_tuner import IntervalStatistics

PROMPTS = ("Return the number of", "This function raises", "If the argument is not", "The class")


def benchmark_tuner(options: argparse.Namespace) -> dict[str, Any]:
    """A validation that tunes against one that does not, and the one-pass variances against direct passes per interval."""
    from bd3_scale.data.open import open_data
    from bd3_scale.generation.load_model import load_network
    from bd3_scale.training.validation import Validator

    loaded = load_network(options.checkpoint, device=options.device)
    recipe, objective, device = loaded.recipe, loaded.objective, loaded.device
    assert isinstance(objective, (BlockDiffusion, MaskedDiffusion)), "only diffusion objectives have an interval"
    layout = layouts.current(recipe.parallel, device)
    data = open_data(recipe.data, recipe.model.context, leader=True, barrier=layout.barrier)
    validator = Validator(data.validation, layout, rows=options.rows, micro_batch=options.micro_batch, seed=recipe.run.seed)

    @torch.no_grad()
    def evaluate(inputs: NetworkInputs) -> Tensor:
        return loaded.network(inputs.to(device))[1]

    def evaluate_all(inputs: Sequence[NetworkInputs]) -> list[Tensor | None]:
        return [evaluate(one) for one in inputs]

    def tune() -> IntervalStatistics:
        statistics = validator.and_tune(objective, evaluate_all, resample=False, rows=None)[1]
        assert statistics is not None, "nothing interrupts it"
        return statistics

    seconds = alternate({"plain": lambda: void(validator(objective, evaluate_all)), "tuning": lambda: void(tune())}, options.rounds, device)
    statistics = tune()
    rows = data.validation.rows(np.arange(validator.total))
    own = all_block_losses(objective, evaluate, rows, options.micro_batch, recipe.run.seed, None)
    agreement = []
    for k, interval in enumerate(statistics.intervals):
        direct = all_block_losses(objective, evaluate, rows, options.micro_batch, recipe.run.seed + 1, interval)
        variance, error = variance_and_error(direct[0])
        times, losses = own[1], own[0]
        inside = (times >= interval[0]) & (times < interval[1])
        one_pass, one_pass_error = variance_and_error(np.where(inside, losses, np.nan))
        assert np.isclose(one_pass, statistics.variances[k], rtol=1e-9), "two computations of one statistic differ"
        agreement.append((interval, one_pass, variance, abs(one_pass - variance) / np.hypot(error, one_pass_error)))
        print(f"{interval}: one pass {one_pass:.3f}, direct {variance:.3f}, {agreement[-1][3]:.1f} standard errors", file=sys.stderr)
    return {
        "rows": validator.total,
        "median_seconds": {name: statistics_module.median(values) for name, values in seconds.items()},
        "tuning_over_plain_time": paired_ratio(seconds["tuning"], seconds["plain"]),
        "candidates": len(agreement),
        "within_three_standard_errors": sum(bool(item[3] <= 3) for item in agreement),
        "variances": [
            {"interval": list(interval), "one_pass": a, "direct": b, "standard_errors_apart": float(c)} for interval, a, b, c in agreement
        ],
    }


def all_block_losses(
    objective: BlockDiffusion | MaskedDiffusion,
    evaluate: Callable[[NetworkInputs], Tensor],
    rows: np.ndarray,
    micro_batch: int,
    seed: int,
    interval: tuple[float, float] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """(block losses, t of the blocks), float64 [rows, B], of a direct pass on `interval`, or of the validation's own noise."""
    losses = []
    for start in range(0, len(rows), micro_batch):
        part, indices = rows[start : start + micro_batch], np.arange(start, min(start + micro_batch, len(rows)))
        if interval is None:
            inputs = objective.validation_inputs(part, indices, seed)
        else:
            inputs = objective.evaluation_inputs(part, indices, seed, interval)
        losses.append(block_losses(inputs, evaluate(inputs)))
    return np.concatenate(losses), validation_times(seed, np.arange(len(rows)), objective.blocks)


def variance_and_error(losses: np.ndarray) -> tuple[float, float]:
    """Sample variance of all numbers of `losses` [rows, blocks] (nan: none) and its standard error with rows as the unit."""
    count = np.isfinite(losses).sum()
    mean = np.nansum(losses) / count
    variance = np.nansum(np.square(losses - mean)) / (count - 1)
    influence = np.nansum(np.where(np.isfinite(losses), np.square(losses - mean) - variance, 0.0), axis=1)
    return float(variance), float(np.sqrt(np.square(influence).sum()) / count)


def void(value: object) -> None:
    """For sides whose result is of no interest."""


def benchmark_sampling(options: argparse.Namespace) -> dict[str, Any]:
    from bd3_scale.generation.generate import generate_tokens
    from bd3_scale.generation.load_model import load_network

    loaded = load_network(options.checkpoint, device=options.device)
    results: dict[str, Any] = {}

    def side(name: str, use_cache: bool) -> Callable[[], None]:
        def run() -> None:
            results[name] = generate_tokens(loaded, prompts=PROMPTS, length=options.length, use_cache=use_cache, stop_at_end_of_text=False)

        return run

    seconds = alternate({"cached": side("cached", True), "uncached": side("uncached", False)}, options.rounds, torch.device(options.device))
    same = all(np.array_equal(a, b) for a, b in zip(results["cached"].tokens, results["uncached"].tokens, strict=True))
    median, cached = {name: statistics_module.median(values) for name, values in seconds.items()}, results["cached"]
    return {
        "prompts": len(PROMPTS),
        "tokens_per_text": [len(row) for row in cached.tokens],
        "same_tokens": same,
        "nfe": cached.nfe,
        "forwards_per_token": cached.nfe * len(PROMPTS) / cached.generated,
        "median_seconds": median,
        "tokens_per_second": {name: cached.generated / value for name, value in median.items()},
        "uncached_over_cached_time": 1 / paired_ratio(seconds["cached"], seconds["uncached"]),
    }
