"""From losses to reported numbers: perplexity, mean with standard error over ranks, and the exact bound of small blocks.

The statistics travel as (count, mean, M2) and are joined by Chan's formula, never as sums of squares (which cancel) nor as
means of per-rank means (which are wrong when ranks hold different numbers of rows). The exact bound is the reference that
Monte-Carlo losses are tested against (docs/objective.md section 7, property 5). Everything is float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np

LARGEST_EXACT_BLOCK = 6


def perplexity(nelbo: float) -> float:
    """exp of nats per data token; inf where that is beyond float64."""
    return math.inf if nelbo > 709.0 else math.exp(nelbo)


@dataclass(frozen=True)
class Moments:
    """Count, mean and M2 (sum of squared deviations) of numbers seen so far; float64 arrays of one shape, or scalars.

    `a + b` is the moments of both sets of numbers (Chan, Golub and LeVeque 1979). Empty sets have mean and M2 0.
    """

    count: np.ndarray | float = 0.0
    mean: np.ndarray | float = 0.0
    m2: np.ndarray | float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Scalar moments of all numbers in `values`."""
        values = np.asarray(values, np.float64).ravel()
        if values.size == 0:
            return cls()
        mean = values.mean()
        return cls(float(values.size), float(mean), float(np.square(values - mean).sum()))

    def __add__(self, other: Moments) -> Moments:
        count = np.asarray(self.count + other.count, np.float64)
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        delta = np.asarray(other.mean, np.float64) - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + np.square(delta) * self.count * share)


def combine(parts: Iterable[Moments]) -> Moments:
    """All parts joined, in the order given (give them in rank order, so that every rank rounds alike)."""
    return reduce(Moments.__add__, parts, Moments())


def mean_and_standard_error(parts: Iterable[Moments]) -> tuple[float, float]:
    """(mean, its standard error) of independent numbers, from one Moments per rank.

    The standard error is sqrt(M2 / (n - 1) / n); nan for fewer than two numbers. Raises ValueError for none.
    """
    total = combine(parts)
    count, mean, m2 = float(total.count), float(total.mean), float(total.m2)
    if count == 0:
        raise ValueError("mean of no numbers")
    return mean, math.sqrt(m2 / (count - 1) / count) if count > 1 else math.nan


def _mask_weight(masked: int, size: int, bounds: tuple[float, float]) -> float:
    """Integral of p^(m-1) (1-p)^(n-m) over p in `bounds`; (m-1)! (n-m)! / n! over the whole of [0, 1]."""
    if bounds == (0.0, 1.0):
        return math.factorial(masked - 1) * math.factorial(size - masked) / math.factorial(size)
    clean = size - masked
    terms = (
        (-1) ** k * math.comb(clean, k) * (bounds[1] ** (masked + k) - bounds[0] ** (masked + k)) / (masked + k) for k in range(clean + 1)
    )
    return math.fsum(terms)


def exact_block_nelbo(
    log_probabilities: Callable[[np.ndarray], np.ndarray],
    tokens: np.ndarray,
    mask_id: int,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> float:
    """The exact bound of one block in nats (a sum over its tokens), by enumerating all masks with at least one masked token.

    The mask probability integrates out: a mask with m of n tokens masked has the weight (m-1)! (n-m)! / n!, times the
    -log p of its masked tokens, whatever the schedule. `bounds` restricts the mask probability p and gives the integral
    over that part only (not divided by its width): what is missing from the bound at U[1e-3, 1] is the rest.

    `log_probabilities`: int64 [k, n] blocks, partly `mask_id` -> float [k, n, V], log p of every token given the block and
    whatever precedes it (closed over). `tokens`: int64 [n], n <= 6. In the first block of a row pass the tokens after
    token 0 and close over token 0: it is never masked and not counted. Raises ValueError for longer blocks.
    """
    tokens = np.asarray(tokens, np.int64)
    size = len(tokens)
    if not 1 <= size <= LARGEST_EXACT_BLOCK:
        raise ValueError(f"the exact bound enumerates 2^n masks and takes 1 to {LARGEST_EXACT_BLOCK} tokens, got {size}")
    masks = (np.arange(1, 2**size)[:, None] >> np.arange(size)) & 1 == 1
    log_p = np.asarray(log_probabilities(np.where(masks, mask_id, tokens)), np.float64)
    of_tokens = log_p[:, np.arange(size), tokens]
    weights = np.array([_mask_weight(int(count), size, bounds) for count in masks.sum(1)])
    return float(-(weights[:, None] * np.where(masks, of_tokens, 0.0)).sum())


@dataclass(frozen=True)
class Validation:
    """nats per data token, its standard error over rows, and exp of it."""

    nelbo: float
    standard_error: float
    perplexity: float
    rows: int

    def __str__(self) -> str:
        return f"NELBO {self.nelbo:.4f} +- {self.standard_error:.4f}, perplexity {self.perplexity:.2f}"


@dataclass(frozen=True)
class CrossEntropy:
    """The same of an objective whose loss bounds no likelihood: nats per data token at t ~ U[1e-3, 1], and its standard error."""

    cross_entropy: float
    standard_error: float
    rows: int

    def __str__(self) -> str:
        return f"cross-entropy {self.cross_entropy:.4f} +- {self.standard_error:.4f} (no likelihood)"


Validated = Validation | CrossEntropy
