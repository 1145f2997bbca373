"""How a block's loss varies given t, measured once for every t: from the sums of nll by the number of masked tokens.

Given how many of a block's tokens are masked, which ones they are, and so the sum S of their nll, does not depend on t. With the block's
loss S / (t n),
    E[loss^2 | t] = sum over m of Binomial(m; n, t) E[S^2 | m] / (t n)^2,
for every t, also where the pass had hardly a masked token. Blocks are pooled by their masked fraction, S^2 in units of m^2, and
neighbouring pools are smoothed. (The score entropy of sedd depends on t a little beside m: its profile is that of a near relative.)

Invariant: sums are made row by row and joined in the order of the rows, so that no layout changes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bd3_scale.objectives.mask_resampling import binomial
from bd3_scale.objectives.network_inputs import BlockSamples
from bd3_scale.objectives.time_density import BINS, TimeDensity
from bd3_scale.rules.objective import Interval

POOLS = 32
"""Of masked fractions, equally wide in their square root: alone for every count of blocks of up to 16 tokens."""
LEAST_MASKED = 30
"""Fewer blocks with a masked token say nothing of how their losses vary."""
SMOOTHING = (0.25, 0.5, 0.25)
PARTS = 10_000
"""Of the whole, in which the probability of a bin is rounded."""


def count_sums(samples: BlockSamples) -> np.ndarray:
    """Sums over the blocks of each row, float64 [m rows, 5, POOLS]: of 1, m, S, m^2 and S^2, of blocks with m > 0 masked tokens."""
    sums = np.zeros((len(samples.times), 5, POOLS))
    counted = samples.maskable > 0
    for row, out in enumerate(sums):  # row by row, as in `interval_tuner.row_statistics`
        of_row = (samples.times, samples.losses, samples.masked, samples.maskable)
        times, losses, masked, maskable = (of[row, counted[row]] for of in of_row)
        total = losses * times * maskable
        pool = pools(masked / maskable)
        some = masked > 0
        for line, values in zip(out, (np.ones(len(masked)), masked, total, masked**2, np.square(total)), strict=True):
            line[:] = np.bincount(pool[some], values[some], POOLS)
    return sums


def pools(fraction: np.ndarray) -> np.ndarray:
    """The pool of each masked fraction, float64 in [0, 1] -> int64 in [0, POOLS)."""
    return np.minimum(np.sqrt(fraction) * POOLS, POOLS - 1).astype(np.int64)


def _ratios(sums: np.ndarray) -> np.ndarray:
    """S / m and S^2 / m^2 of every pool, float64 [2, POOLS], from sums with at least one masked token."""
    smooth = np.stack([np.convolve(line, SMOOTHING, mode="same") for line in sums])
    known = np.flatnonzero(smooth[0] > 0)
    return np.stack([np.interp(np.arange(POOLS), known, smooth[top, known] / smooth[below, known]) for top, below in ((2, 1), (4, 3))])


def masked_nll(sums: np.ndarray) -> tuple[float, ...]:
    """Mean nll of a masked token in every pool, from `count_sums` of all rows; () where there are too few to say anything."""
    return tuple(_ratios(sums)[0].tolist()) if sums[0].sum() >= LEAST_MASKED else ()


@dataclass(frozen=True)
class LossProfile:
    """Moments of a block's loss given t, of blocks of `block_size` tokens under the linear schedule."""

    block_size: int
    first: np.ndarray
    """float64 [n + 1]: E[S | m] of every masked count m."""
    second: np.ndarray
    """float64 [n + 1]: E[S^2 | m]."""

    @classmethod
    def of(cls, sums: np.ndarray, block_size: int) -> LossProfile | None:
        """From `count_sums` of all rows, added up: float64 [5, POOLS]. None where there are too few to say anything."""
        if sums[0].sum() < LEAST_MASKED:
            return None
        nll, square = _ratios(sums)
        counts = np.arange(block_size + 1)
        pool = pools(counts / block_size)
        return cls(block_size, nll[pool] * counts, square[pool] * counts**2)

    def moments(self, interval: Interval) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(edges of BINS bins of the interval, integrals over each bin of E[loss | t] and of E[loss^2 | t]): float64."""
        edges = TimeDensity(interval, (1,) * BINS).edges
        nodes, shares = np.polynomial.legendre.leggauss(8)
        root = np.sqrt(edges)
        half = np.diff(root)[:, None] / 2
        r = root[:-1, None] + half * (nodes + 1)
        t, measure = np.square(r), 2 * r * half * shares
        probability = binomial(t, self.block_size)
        first, second = (
            ((probability @ moment) / (t * self.block_size) ** power * measure).sum(1)
            for power, moment in ((1, self.first), (2, self.second))
        )
        return edges, first, second

    def mean(self, interval: Interval) -> float:
        """Of a block's loss at t ~ U[beta, omega]."""
        if interval[0] == interval[1]:
            return float((binomial(np.array(interval[1]), self.block_size) @ self.first) / (interval[1] * self.block_size))
        return float(self.moments(interval)[1].sum() / (interval[1] - interval[0]))

    def variance(self, density: TimeDensity) -> float:
        """Of the corrected loss of a block whose t is drawn from `density`."""
        edges, _, second = self.moments(density.interval)
        width = edges[-1] - edges[0]
        heights = density.probabilities / np.diff(density.edges)
        here = np.searchsorted(density.edges[1:-1], (edges[:-1] + edges[1:]) / 2)
        return float((second / heights[here]).sum() / width**2 - self.mean(density.interval) ** 2)

    def best(self, interval: Interval) -> TimeDensity:
        """The density of the least variance on an interval, in whole numbers."""
        edges, _, second = self.moments(interval)
        mass = np.sqrt(np.diff(edges) * second)
        return TimeDensity(interval, tuple(np.rint(PARTS * mass / mass.sum()).astype(int).tolist()))
