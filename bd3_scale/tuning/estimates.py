"""From losses to reported numbers: perplexity, nats per token with standard error, and what a model has to beat.

The statistics of the tuner travel as (count, mean, M2) and are joined by Chan's formula, never as sums of squares (which cancel) nor as
means of per-rank means (which are wrong when ranks hold different numbers of rows). Everything is float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np

from bd3_scale.data.counted import counted, ids


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


def per_token(losses: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """(nats per token, its standard error) of independent rows with these losses, float64 [n], and tokens that count, int64 [n].

    All losses over all tokens; the error is that of the ratio to first order, which is the plain one of a mean where rows have as many
    tokens as each other, and nan for fewer than two rows. Raises ValueError where there are no tokens.
    """
    losses, tokens = np.asarray(losses, np.float64), np.asarray(tokens, np.int64)
    rows, total = len(losses), int(tokens.sum())
    if total == 0:
        raise ValueError("nats per token of no tokens")
    mean = float(losses.sum()) / total
    if rows < 2:
        return mean, math.nan
    residual = losses - mean * tokens
    return mean, math.sqrt(float(np.square(residual).sum()) * rows / (rows - 1)) / total


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


def unigram_perplexity(train_rows: np.ndarray, validation_rows: np.ndarray, vocabulary: int) -> float:
    """Perplexity per token of `validation_rows` under the token frequencies of `train_rows` (int64 [n, L] and [m, L]).

    Frequencies are smoothed by adding one to the count of each of the `vocabulary` ids. Only tokens that count are looked at, of both,
    so never position 0.
    """
    counts = np.bincount(ids(train_rows)[counted(train_rows)], minlength=vocabulary) + 1.0
    held_out = np.bincount(ids(validation_rows)[counted(validation_rows)], minlength=vocabulary)
    return math.exp(-float(held_out @ np.log(counts / counts.sum())) / float(held_out.sum()))
