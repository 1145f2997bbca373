"""Noise schedules: how probable a mask is at time t, and the weight that makes the loss a likelihood bound.

With alpha(t) the probability that a token is still clean, the bound of a block is (Arriola et al. 2025, eq. 8)
    E_t [ -alpha'(t) / (1 - alpha(t)) * sum over masked i of -log p(x_i | x_t^b, x^<b) ],   t ~ U[0, 1].
With p = 1 - alpha(t) as the variable the integrand is 1/p, so every schedule that rises from p(0) = 0 to p(1) = 1 has the
same value; only the variance of its estimate differs (section 4.2, table 8). Paper and code call sqrt "square root", log
"logarithmic", linear "log-linear".

Training draws the *time* t ~ U[beta, omega], also for schedules where the mask probability is another number; the paper's
clipped intervals are those of the linear schedule, where the two are one. Reported NELBOs are always linear.

Invariants: mask_probability(1) is exactly 1, so that t = 1 masks everything; weight(t) = mask_probability'(t) /
mask_probability(t). There is no epsilon inside a schedule: the interval keeps t away from 0 where that matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bd3_scale.objectives.time_density import TimeDensity
from bd3_scale.rules.objective import check_schedule

Function = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Schedule:
    """Both functions map float64 arrays of times to float64 arrays of the same shape; `weight` needs t > 0."""

    name: str
    mask_probability: Function
    """1 - alpha(t), rising from 0 at t = 0 to 1 at t = 1."""
    weight: Function
    """-alpha'(t) / (1 - alpha(t)): what each masked token's -log p is multiplied by."""


LINEAR = Schedule("linear", lambda t: t, lambda t: 1.0 / t)

SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        LINEAR,
        # 1 - cos(pi t / 2), written such that t = 1 gives exactly 1.
        Schedule("cosine", lambda t: 1.0 - np.sin(0.5 * np.pi * (1.0 - t)), lambda t: 0.5 * np.pi / np.tan(0.25 * np.pi * t)),
        Schedule("square", np.square, lambda t: 2.0 / t),
        Schedule("sqrt", np.sqrt, lambda t: 0.5 / t),
        Schedule("log", lambda t: np.log1p(t) / np.log1p(1.0), lambda t: 1.0 / ((1.0 + t) * np.log1p(t))),
    )
}
"""The formulas of `rules.objective.NOISE_SCHEDULES`."""


def schedule_named(name: str) -> Schedule:
    """Raises RecipeError for an unknown name."""
    check_schedule(name)
    return SCHEDULES[name]


@lru_cache(maxsize=64)
def expected_masked(schedule: str, density: TimeDensity) -> float:
    """Mean mask probability at t of this density (midpoint rule: exact for the linear schedule with a uniform one)."""
    times, _ = density.draw((np.arange(1000) + 0.5) / 1000)
    return float(schedule_named(schedule).mask_probability(times).mean())
