"""The density of t with the least variance, from the pass that the interval tuner makes anyway.

An unbiased estimate of the mean loss over an interval varies least where t is drawn in proportion to sqrt(E[loss^2 | t]), in bins of
width w to sqrt(w * integral of E[loss^2 | t]); `objectives.loss_profile` has that for every t.

Invariants: a density is a few whole numbers, so that layouts, whose losses differ by rounding, learn the same one; the variance must fall
by more than `tuner.margin` for a change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from bd3_scale.objectives.loss_profile import LossProfile
from bd3_scale.objectives.time_density import TimeDensity


@dataclass(frozen=True)
class DensityChoice:
    """The density to train with from now on, and why."""

    learned: tuple[float, ...]
    """Its shape; (): the recipe's stays."""
    variance: float
    """Of a block's loss with it; nan where it could not be measured."""
    uniform_variance: float
    """The same with a uniform density on the same interval."""
    changed: bool


def choose_density(sums: np.ndarray, block_size: int, current: TimeDensity, learned: tuple[float, ...], margin: float) -> DensityChoice:
    """The best density on the interval of `current`, if it beats that by more than `margin`; else the current one, and its `learned`
    shape where it has one. `sums`: see `LossProfile.of`."""
    profile = LossProfile.of(sums, block_size)
    if profile is None or current.interval[0] == current.interval[1]:
        return DensityChoice(learned, math.nan, math.nan, False)
    best = profile.best(current.interval)
    here, there, uniform = (profile.variance(of) for of in (current, best, replace(current, shape=())))
    if there < (1 - margin) * here:
        return DensityChoice(best.shape, there, uniform, True)
    return DensityChoice(learned, here, uniform, False)
