"""SSD-LM (Han et al. 2022, arXiv 2210.17432): Gaussian diffusion on the simplex over the words, block after block.

Word w is the vector x_0 of almost-one-hot logits, +K at w and -K elsewhere (K = 5; MASK is no word). At time t it has become
    x_t = sqrt(abar(t)) x_0 + sqrt(1 - abar(t)) K eps,    eps ~ N(0, I),
and the network sees softmax(x_t) E, the expected embedding, at every position of the noisy block; the clean blocks before it;
and t. It is trained to predict all words of the block by cross-entropy, every position alike. That is no bound of the
likelihood: such a model is compared by its texts alone.

Invariants: eps is a function of (seed, purpose, place, word), made where it is used (`keyed_random.normals`), so that no tensor of
positions x words is kept or sent; at t = 0 the word has e^2K times the mass of any other, at t = 1 nothing is left of it; noisy
positions carry their clean word as token, of which the network sees nothing but x_t; token 0 of a row is never noised and never
counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bd3_scale.keyed_random import normals

K = 5.0
"""Size of the logits (section 3.1 of the paper; their experiments' value)."""
OFFSET = 1e-4
"""s of the cosine schedule, as in the paper's code."""
TIME_UNITS = 1000.0
"""Networks are conditioned on the time in thousandths, as since Ho et al. 2020; clean rows are at 0."""


def remaining_signal(times: np.ndarray) -> np.ndarray:
    """abar(t) of the cosine schedule (Nichol & Dhariwal 2021, eq. 17): float64 in [0, 1] -> 1 at t = 0 to exactly 0 at t = 1."""
    start = math.sin(0.5 * math.pi / (1.0 + OFFSET))
    # cos of (t + s) / (1 + s) from its other side, where t = 1 gives 0 without rounding.
    return np.square(np.sin(0.5 * math.pi * (1.0 - np.asarray(times)) / (1.0 + OFFSET)) / start)


def conditioning_times(times: np.ndarray) -> Tensor:
    """What a network is conditioned on at these times: float64 -> float32 of the same shape."""
    return torch.from_numpy(TIME_UNITS * np.asarray(times)).float()


@dataclass(frozen=True)
class SimplexNoise:
    """What the noisy positions' words become; tensors of one shape [m, n] on one device."""

    keys: Tensor
    """int64: key of each position's Gaussian noise (`keyed_random.normals`)."""
    signal: Tensor
    """float32: sqrt(abar(t)) of each position."""
    spread: Tensor
    """float32: sqrt(1 - abar(t))."""

    @classmethod
    def at(cls, keys: np.ndarray, times: np.ndarray) -> SimplexNoise:
        """Of keys int64 [m, n] at times float64 [m, n]; a position at time 0 stays clean."""
        remaining = remaining_signal(times)
        signal, spread = (torch.from_numpy(np.sqrt(part)).float() for part in (remaining, 1.0 - remaining))
        return cls(torch.from_numpy(keys), signal, spread)

    def moved(self, move: Callable[[Tensor], Tensor]) -> SimplexNoise:
        """The same with every tensor given through `move`."""
        return SimplexNoise(move(self.keys), move(self.signal), move(self.spread))

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """(keys, signal, spread), each [m * n], row by row."""
        return self.keys.flatten(), self.signal.flatten(), self.spread.flatten()


def masses(tokens: Tensor, keys: Tensor, signal: Tensor, spread: Tensor, first: int, last: int) -> Tensor:
    """exp(x_t), up to a factor of each position, of the words `first` to `last` - 1: four tensors [n] -> fp32 [n, last - first].

    Left out is the factor exp(-K signal) of all words of a position. What is left is at most exp(2 K + 6.7 K) = e^44, of which
    fp32 can add up as many as there are words: no maximum has to be found, nor agreed on by ranks that share the words.
    """
    logits = normals(keys, first, last).mul_((K * spread)[:, None])
    here = tokens - first
    held = (here >= 0) & (here < last - first)
    lifted = torch.where(held, 2.0 * K * signal, 0.0)
    logits.scatter_add_(1, here.clamp(0, max(0, last - first - 1))[:, None], lifted[:, None])
    return logits.exp_()
