"""Masks whose realised fraction stays inside an interval: a truncated binomial count, then a random subset of that size.

`objective.resample` asks for it (docs/objective.md section 4). Given its mask probability p a block of n maskable tokens has
Binomial(n, p) masked ones; here the count is drawn from that distribution restricted to the counts m with m / n inside
[beta, omega], by inverting its distribution function, and the subset is uniform among those of size m. One draw per
block: no loop until it fits.

Where no count fits (a block of one maskable token and an interval without 0 and 1) there is nothing to keep inside, and
the count is unrestricted. Token 0 of a row is never masked and is no maskable token.

`importance` serves the tuner: given its masked count a block's mask is the same uniform subset under every interval,
resampled or not, and the network does not see t. So a block that validation masked m tokens of stands for the resampled
blocks with m masked tokens, with the ratio of the two probabilities of m as its weight; the ratio is bounded, which it
would not be between the two distributions of (t, m).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor

import numpy as np

from bd3_scale.objectives import noise
from bd3_scale.recipe.objective_kinds import VALIDATION_INTERVAL
from bd3_scale.rules.objective import Interval


def admissible_counts(size: int, interval: Interval) -> tuple[int, int]:
    """Least and largest masked count of `size` tokens whose fraction lies in [beta, omega]; (0, size) where none does."""
    slack = 1e-9  # 0.55 * 20 is 11.000000000000002 in floats
    low, high = ceil(interval[0] * size - slack), floor(interval[1] * size + slack)
    return (low, high) if low <= high else (0, size)


@lru_cache(maxsize=8)
def _log_choose(size: int) -> np.ndarray:
    """log of the binomial coefficients of `size`, float64 [size + 1]."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size + 1)))])
    return log_factorial[size] - log_factorial - log_factorial[::-1]


def binomial(probability: np.ndarray, size: int) -> np.ndarray:
    """Binomial(size, p) of every count: float64 [...] -> [..., size + 1]."""
    return _probabilities(probability, size, 0, size)


def _probabilities(probability: np.ndarray, size: int, low: int, high: int) -> np.ndarray:
    """Binomial(size, p) of the counts low..high: float64 [...] -> [..., high - low + 1]."""
    counts = np.arange(low, high + 1)
    p = np.asarray(probability, np.float64)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        # 0 * log(0) counts as 0: p = 0 masks nothing and p = 1 everything.
        log_p = np.where(counts > 0, counts * np.log(p), 0.0) + np.where(counts < size, (size - counts) * np.log1p(-p), 0.0)
    return np.exp(_log_choose(size)[low : high + 1] + log_p)


def truncated_counts(uniforms: np.ndarray, probability: np.ndarray, size: int, interval: Interval) -> np.ndarray:
    """Masked counts, int64 [...], from `uniforms` in [0, 1) and mask probabilities in [beta, omega], both [...]."""
    low, high = admissible_counts(size, interval)
    cumulative = np.cumsum(_probabilities(probability, size, low, high), axis=-1)
    return low + (uniforms[..., None] * cumulative[..., -1:] >= cumulative[..., :-1]).sum(-1)


def resampled_tokens(
    seed: int,
    step: int,
    slots: np.ndarray,
    probabilities: np.ndarray,
    denoised: np.ndarray,
    block_size: int,
    interval: Interval,
    mirrored: np.ndarray | None = None,
) -> np.ndarray:
    """As `noise.masked_tokens`, with every block's masked fraction inside `interval`: bool [m, blocks * block_size].

    `probabilities`: float64 [m, blocks] in `interval`; `denoised`: bool [m, blocks * block_size], what may be masked.
    """
    maskable = denoised.reshape(*probabilities.shape, block_size).sum(2)
    uniforms = noise.count_uniforms(seed, step, slots, maskable.shape[1], mirrored)
    counts = np.zeros(uniforms.shape, np.int64)
    for size in np.unique(maskable):
        here = maskable == size
        counts[here] = truncated_counts(uniforms[here], probabilities[here], int(size), interval)
    return noise.masked_subsets(seed, step, slots, counts, denoised, block_size, mirrored)


@dataclass(frozen=True)
class Importance:
    """How blocks of one size, seen at t ~ U[1e-3, 1], stand for resampled ones at t ~ U[beta, omega]: float64 [size + 1, k].

    One row for every masked count m, one column for every interval; linear schedule.
    """

    weight: np.ndarray
    """P(m | resampled) / P(m | seen)."""
    inverse_time: np.ndarray
    """Mean of 1 / t given m, resampled; 0 where m cannot be."""
    inverse_time_variance: np.ndarray


@lru_cache(maxsize=8)
def importance(size: int, intervals: tuple[Interval, ...]) -> Importance:
    """`Importance` for blocks of `size` maskable tokens; the intervals must be wider than a point."""
    seen, _, _ = _count_distribution(size, VALIDATION_INTERVAL, (0, size))
    resampled = [_count_distribution(size, interval, admissible_counts(size, interval)) for interval in intervals]
    probability, mean, square = (np.stack(part, axis=1) for part in zip(*resampled, strict=True))
    return Importance(probability / seen[:, None], mean, np.maximum(square - np.square(mean), 0.0))


def _count_distribution(size: int, interval: Interval, counts: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For t ~ U[beta, omega] and counts restricted to low..high: P(m), E[1/t | m], E[1/t^2 | m], float64 [size + 1] each."""
    # Gauss-Legendre in t^(1/4): fine where 1/t^2 is steep, and everywhere finer than the width of the binomial.
    nodes, shares = _gauss_legendre(max(64, 16 * ceil(size**0.5)))
    low, high = interval[0] ** 0.25, interval[1] ** 0.25
    root = low + (high - low) * nodes
    t, measure = root**4, shares * (high - low) * 4 * root**3 / (interval[1] - interval[0])
    joint = np.zeros((len(t), size + 1))
    joint[:, counts[0] : counts[1] + 1] = _probabilities(t, size, *counts)
    joint *= (measure / joint.sum(1))[:, None]
    probability = joint.sum(0)
    means = [
        np.divide((joint / t[:, None] ** power).sum(0), probability, out=np.zeros(size + 1), where=probability > 0) for power in (1, 2)
    ]
    return probability, means[0], means[1]


@lru_cache(maxsize=4)
def _gauss_legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and shares on [0, 1]."""
    nodes, shares = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, shares / 2
