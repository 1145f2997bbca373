"""The learned density: the least variance, as drawn losses show it; a choice that rounding, few blocks and small gains do not move."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bd3_scale.objectives.loss_profile import LEAST_MASKED, LossProfile, count_sums
from bd3_scale.objectives.network_inputs import block_losses, counted_tokens
from bd3_scale.objectives.table import BlockDiffusion
from bd3_scale.objectives.time_density import BINS, TimeDensity, time_density
from bd3_scale.rules.objective import Interval
from bd3_scale.tuning.density_tuner import choose_density
from tests.unit.tuning.test_interval_tuner import MASK, WHOLE, _nll, _rows, _samples


def _sums(objective: BlockDiffusion, count: int = 300) -> np.ndarray:
    indices = np.arange(count)
    return count_sums(_samples(objective, _rows(count, objective.context), indices)).sum(0)


def _profile(objective: BlockDiffusion) -> LossProfile:
    profile = LossProfile.of(_sums(objective), objective.block_size)
    assert profile is not None
    return profile


@pytest.mark.parametrize(("block_size", "interval"), [(4, WHOLE), (16, WHOLE), (4, (0.3, 0.8)), (192, WHOLE)])
def test_the_variance_is_that_of_drawn_losses_and_no_density_has_less(block_size: int, interval: Interval) -> None:
    objective = BlockDiffusion(MASK, 192, block_size, interval)
    profile, random, count = _profile(objective), np.random.default_rng(0), 1500
    best, uniform = profile.best(interval), TimeDensity(interval)
    assert profile.variance(best) < profile.variance(uniform) * (0.9 if block_size <= 16 and interval == WHOLE else 1)
    for shape in (*random.uniform(0, 1, (20, BINS)), *(np.abs(best.shape + random.normal(0, 30, BINS)) for _ in range(20))):
        assert profile.variance(best) < profile.variance(replace(best, shape=tuple(shape))) * 1.01  # its uniform share costs a little
    for density in (best, uniform, time_density(interval, "pareto", ())):
        inputs = replace(objective, learned=density.shape).training_inputs(_rows(count, 192), np.arange(count), 5, 0, count)
        losses = block_losses(inputs, _nll(inputs, block_size))[:, counted_tokens(objective.pattern) == block_size].ravel()
        if block_size == 192:
            losses = block_losses(inputs, _nll(inputs, block_size)).ravel()
        variance = losses.var(ddof=1)
        error = math.sqrt((((losses - losses.mean()) ** 4).mean() - variance**2) / losses.size)
        assert abs(profile.variance(density) - variance) < 4 * error + 0.05 * variance, (
            density,
            profile.variance(density),
            variance,
            error,
        )


def test_a_block_of_one_token_has_its_closed_form() -> None:
    """sqrt(E[loss^2 | t]) is t^(-1/2) times a number, and bins are equally wide in sqrt(t): all have the same mass."""
    profile = _profile(BlockDiffusion(MASK, 48, 1))
    assert np.ptp(profile.best(WHOLE).shape) <= 0.02 * np.mean(profile.best(WHOLE).shape)
    # E[nll^2] times ln(1000) / 0.999 with a uniform density, ((1 - sqrt(.001)) 2 / 0.999)^2 with the best, whose uniform share costs 0.5 %
    square, mean = profile.second[1], profile.first[1]
    assert profile.variance(TimeDensity(WHOLE)) == pytest.approx(square * math.log(1000) / 0.999 - mean**2, rel=1e-3)
    root = 2 * (1 - math.sqrt(1e-3)) / 0.999
    assert profile.variance(TimeDensity(WHOLE, profile.best(WHOLE).shape)) == pytest.approx(square * root**2 - mean**2, rel=0.01)


def test_the_choice_needs_a_reason() -> None:
    objective = BlockDiffusion(MASK, 192, 4)
    sums, uniform = _sums(objective), TimeDensity(WHOLE)
    chosen = choose_density(sums, 4, uniform, (), 0.02)
    assert chosen.changed and len(chosen.learned) == BINS and all(isinstance(part, int) for part in chosen.learned)
    assert chosen.variance < 0.9 * chosen.uniform_variance
    # What rounding of another layout leaves of it is the same, number for number.
    assert choose_density(sums * (1 + 1e-7), 4, uniform, (), 0.02).learned == chosen.learned
    # The next one stays, unless something is gained by another.
    learned = TimeDensity(WHOLE, chosen.learned)
    again = choose_density(sums, 4, learned, chosen.learned, 0.02)
    assert not again.changed and again.learned == chosen.learned and again.variance == chosen.variance
    assert not choose_density(sums, 4, time_density(WHOLE, "pareto", ()), (), 0.5).changed
    assert choose_density(sums, 4, time_density(WHOLE, "beta", ()), (), 0.5).changed
    # A point has one density, and few blocks say nothing.
    for density, known in ((TimeDensity((1.0, 1.0)), sums), (uniform, sums * LEAST_MASKED / sums[0].sum() * 0.99)):
        none = choose_density(known, 4, density, (), 0.0)
        assert none.learned == () and not none.changed and math.isnan(none.variance)


def test_few_rows_leave_no_hole() -> None:
    """Of 40 rows of one block most masked counts were never seen."""
    objective = BlockDiffusion(MASK, 192, 192)
    sums = _sums(objective, 40)
    profile = LossProfile.of(sums, 192)
    assert profile is not None and (profile.second[1:] > 0).all() and (np.array(profile.best(WHOLE).shape) > 0).all()
