"""Schedules: boundary values, weights as derivatives, and one NELBO for all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bd3_scale.errors import RecipeError
from bd3_scale.objectives.noise import SCHEDULES, Schedule, schedule_named
from bd3_scale.rules.objective import NOISE_SCHEDULES, checked_interval

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@every_schedule
def test_mask_probability_rises_from_0_to_exactly_1(schedule: Schedule) -> None:
    assert schedule.mask_probability(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]
    values = schedule.mask_probability(np.linspace(0, 1, 1001))
    assert (np.diff(values) > 0).all()


@every_schedule
def test_weight_is_the_logarithmic_derivative_of_the_mask_probability(schedule: Schedule) -> None:
    t = np.linspace(1e-2, 1 - 1e-3, 500)
    step = 1e-4 * t
    slope = (np.log(schedule.mask_probability(t + step)) - np.log(schedule.mask_probability(t - step))) / (2 * step)
    np.testing.assert_allclose(schedule.weight(t), slope, rtol=1e-6)


@every_schedule
@pytest.mark.parametrize("masked", [1, 2, 4])
def test_every_schedule_integrates_to_the_same_bound(schedule: Schedule, masked: int) -> None:
    """Integral over t of weight * P(these m of n tokens are masked) = (m-1)! (n-m)! / n!, whatever the schedule."""
    size = 4
    # t = s^4 takes the pole of sqrt's weight out of the integrand; Gauss-Legendre then has nothing left to miss.
    nodes, shares = np.polynomial.legendre.leggauss(200)
    s = (nodes + 1) / 2
    t, measure = s**4, shares / 2 * 4 * s**3
    p = schedule.mask_probability(t)
    integral = (measure * schedule.weight(t) * p**masked * (1 - p) ** (size - masked)).sum()
    assert integral == pytest.approx(math.factorial(masked - 1) * math.factorial(size - masked) / math.factorial(size), rel=1e-9)


def test_linear_is_t_and_1_over_t() -> None:
    t = np.array([0.001, 0.3, 1.0])
    linear = schedule_named("linear")
    np.testing.assert_array_equal(linear.mask_probability(t), t)
    np.testing.assert_array_equal(linear.weight(t), 1 / t)


def test_what_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'loglinear'.*linear, cosine"):
        schedule_named("loglinear")
    assert tuple(SCHEDULES) == NOISE_SCHEDULES, "the names that recipes may have"
    for interval in ((0.5, 0.4), (-0.1, 1.0), (0.2, 1.1), (0.0, 0.0), (math.nan, 1.0), (0.1, 0.2, 0.3)):
        with pytest.raises(RecipeError, match=r"objective\.interval is"):
            checked_interval(interval)  # type: ignore[arg-type]
    assert checked_interval((1, 1)) == (1.0, 1.0)
