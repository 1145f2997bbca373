"""Several noisy draws of each row of data, independent or in pairs: which random numbers each of them has, and at which times.

Draw j of the row in slot n of a global batch is noisy row n k + j of k times as many, with the noise of that index: as if each draw were
a row of its own, and the strata of t run over all draws of the batch. In pairs the two of a pair have one index, and the second has the
mirrored numbers of the first (1 - u for u): each by itself is distributed as a single draw is, so every mean over draws estimates what it
did before, and what is bad luck for the one is good for the other. Of a pair at t and t' a token with number u is masked where u < t, and
where u > 1 - t'. The pairs differ in t', which is t reflected

- antithetic: in the middle of the interval [beta, omega], t' = beta + omega - t, whatever the schedule;
- complement: at 1/2, t' = 1 - t, where both lie in the interval; so the second masks exactly what the first leaves. The rest of an interval
  that is not symmetric, such as (0.7, 0.8] of [0.3, 0.8], is reflected in its own middle.

Both map the uniform distribution of t onto itself. Invariant: one draw is the noise that a row had before there were several.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class NoisyRows:
    """All draws of some rows of a global batch, row after row: n in all."""

    slots: np.ndarray
    """int64 [n]: what keys the noise of each, in [0, batch)."""
    batch: int
    """Slots of the whole global batch, of which each is used once, or by the two of a pair."""
    mirrored: np.ndarray | None
    """bool [n]: which have the mirrored numbers of their slot; None: none."""

    @classmethod
    def of(cls, slots: np.ndarray, global_batch: int, draws: int, pairs: str = "independent") -> NoisyRows:
        """`slots` int64 [m] of `global_batch` rows of data, each with `draws` draws -> n = m draws."""
        every = (np.asarray(slots, np.int64)[:, None] * draws + np.arange(draws)).ravel()
        if pairs == "independent":
            return cls(every, global_batch * draws, None)
        return cls(every // 2, global_batch * draws // 2, every % 2 == 1)


def fold(pairs: str, interval: tuple[float, float]) -> float:
    """Where the interval, as positions in [0, 1], is cut into the two parts that are each reflected in their own middle; 0: nowhere."""
    beta, omega = interval
    if pairs != "complement" or beta == omega:
        return 0.0
    position = (1.0 - omega - beta) if beta + omega <= 1.0 else (1.0 - 2.0 * beta)
    return min(max(position / (omega - beta), 0.0), 1.0)


def reflected(positions: np.ndarray, fold: float) -> np.ndarray:
    """Positions in [0, 1], each reflected in the middle of its part, [0, fold) or [fold, 1]."""
    return np.where(positions < fold, fold - positions, 1.0 + fold - positions)
