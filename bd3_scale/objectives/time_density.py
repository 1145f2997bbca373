"""The density that training draws t from inside [beta, omega], and the correction that leaves the expected loss as it is.

The interval says which t are trained on, the density how often each. A block whose t came from a density q counts (1 / W) / q(t)
times, W = omega - beta: the mean of such losses is that of t ~ U[beta, omega] for every q, on [1e-3, 1] the NELBO itself. What q
changes is their variance (docs/objective.md section 4; `density_tuner` finds the least).

Invariants: a density is constant on bins that are equally wide in sqrt(t), fine where losses vary most; a share of it is uniform, so that
no correction exceeds 1 / UNIFORM_SHARE; positions in [0, 1) are mapped to t by the inverse distribution function, which ascends: strata of
the one are strata of the other; `uniform` draws the very t of `noise.block_times`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from bd3_scale.objectives.noise import in_interval
from bd3_scale.rules.objective import DENSITY_SHAPES, Interval

BINS = 32
UNIFORM_SHARE = 0.1
"""The least that a density is of the uniform one; the most that a block's loss is enlarged is the inverse, 10."""


@dataclass(frozen=True)
class TimeDensity:
    """A piecewise-constant density on [beta, omega]."""

    interval: Interval
    shape: tuple[float, ...] = ()
    """Relative probability of each bin before the uniform share is mixed in, any number of bins; (): uniform."""

    @cached_property
    def edges(self) -> np.ndarray:
        """float64 [bins + 1], from beta to omega."""
        edges = np.square(np.linspace(math.sqrt(self.interval[0]), math.sqrt(self.interval[1]), max(1, len(self.shape)) + 1))
        edges[[0, -1]] = self.interval
        return edges

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Of each bin, float64 [bins]."""
        uniform = self._uniform
        if not self.shape:
            return uniform
        shape = np.asarray(self.shape, np.float64)
        return (1 - UNIFORM_SHARE) * shape / shape.sum() + UNIFORM_SHARE * uniform

    @property
    def _uniform(self) -> np.ndarray:
        widths = np.diff(self.edges)
        return widths / widths.sum()

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in [0, 1), float64 [...] -> (t, correction of the loss there), float64 [...] each."""
        if not self.shape:
            return in_interval(positions, self.interval), np.ones_like(positions)
        probabilities, edges = self.probabilities, self.edges
        ends = np.cumsum(probabilities)
        bins = np.searchsorted(ends[:-1], positions, side="right")
        inside = (positions - (ends - probabilities)[bins]) / probabilities[bins]
        times = np.clip(edges[bins] + np.diff(edges)[bins] * inside, edges[bins], edges[bins + 1])
        return times, (self._uniform / probabilities)[bins]


@lru_cache(maxsize=64)
def time_density(interval: Interval, name: str, shape: tuple[float, ...], learned: tuple[float, ...] = ()) -> TimeDensity:
    """The density `name` of a recipe with its `shape` (objective.density_shape; () where it sets none), on `interval`; `learned`: the
    shape that the tuner found instead.

    On a point there is only one. Beta's variable is the place in the interval; Pareto's scale is beta, and it is cut off at omega.
    """
    if interval[0] == interval[1] or (name == "uniform" and not learned):
        return TimeDensity(interval)
    if learned:
        return TimeDensity(interval, learned)
    edges, shape = TimeDensity(interval, (1.0,) * BINS).edges, shape or DENSITY_SHAPES[name]
    if name == "beta":
        nodes, shares = np.polynomial.legendre.leggauss(16)
        places = (edges - interval[0]) / (interval[1] - interval[0])
        here = places[:-1, None] + np.diff(places)[:, None] * (nodes + 1) / 2
        logarithm = (shape[0] - 1) * np.log(here) + (shape[1] - 1) * np.log1p(-here)  # which no shape lets over- or underflow
        masses = np.diff(places) * (np.exp(logarithm - logarithm.max()) * shares).sum(1)
    else:
        (alpha,) = shape
        masses = np.diff(np.log(edges)) if alpha == 0 else -np.diff((edges / edges[0]) ** -alpha) / alpha
    return TimeDensity(interval, tuple(masses.tolist()))
