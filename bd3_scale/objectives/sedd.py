"""SEDD (Lou et al. 2024) with the absorbing state: masked diffusion by score entropy, with a network conditioned on the noise.

The network estimates the ratios p_t(x with y at i) / p_t(x) for every masked position i and every word y. With alpha(t) the
probability that a token is still clean and N words (ids of text), they are parameterised as in the paper's code,
    s_y = alpha / (1 - alpha) * exp(z_y) / N,    z: the logits.
The denoising score entropy, weighted by the rate of the noise, -alpha' / alpha (their eq. 5 and theorem 3.6), is at a masked
position whose token is x0
    -alpha' / alpha * (sum_y s_y - r log s_x0 + r log r - r),    r = alpha / (1 - alpha),
and 0 elsewhere. r cancels: this is the schedule's weight -alpha' / (1 - alpha), as in masked diffusion, times
    A - 1 - z_x0 + log N,    A = mean of exp(z) over the words,
which is the cross-entropy of softmax(z) plus A - 1 - log A >= 0. So noise, weights, intervals and validation are those of
`MaskedDiffusion`; its sum bounds the negative log-likelihood, and is tight where the scores are exact (then A = 1).

In sampling, softmax(z) is what a revealed token is drawn from, and A decides how probable it is to be revealed: the analytic
sampler (Tweedie, their theorem 4.2) and Euler's both do so with A times a factor of the two times (`reveal_factor`), which
with alpha linear in t (log-linear noise) is the same number. Ancestral and first-hitting sampling take A = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.objectives.mdlm import MaskedDiffusion
from bd3_scale.objectives.network_inputs import NetworkInputs
from bd3_scale.objectives.noise import Schedule
from bd3_scale.recipe.objective_kinds import KINDS, Kind

CLEAN_AT_MOST = 1e-3
"""The paper's epsilon: it keeps the noise that the network is conditioned on finite where everything is masked, and changes no mask."""


def noise_levels(mask_probabilities: np.ndarray) -> Tensor:
    """sigma = -log(alpha) of rows with these mask probabilities 1 - alpha (float64 [m], in [0, 1]): float32 [m], 0 to 6.9."""
    return torch.from_numpy(-np.log1p(-(1.0 - CLEAN_AT_MOST) * mask_probabilities)).float()


@dataclass(frozen=True)
class ScoreEntropy(MaskedDiffusion):
    """SEDD: the rows of masked diffusion, scored by score entropy. The network is conditioned on sigma of each row's t."""

    traits: ClassVar[Kind] = KINDS["sedd"]

    def _inputs(
        self,
        rows: np.ndarray,
        masked: np.ndarray,
        times: np.ndarray,
        schedule: Schedule,
        dropout_keys: np.ndarray,
        pattern: AttentionPattern,
        corrections: np.ndarray | None = None,
    ) -> NetworkInputs:
        inputs = super()._inputs(rows, masked, times, schedule, dropout_keys, pattern, corrections)
        return replace(inputs, noise_levels=noise_levels(schedule.mask_probability(times[:, 0])), uses_cross_entropy=False)


def total_scores(logits: Tensor) -> Tensor:
    """A, the mean of exp over the words: logits [..., V], -inf at MASK, the last -> float64 [...]."""
    return (logits.double().logsumexp(-1) - math.log(logits.shape[-1] - 1)).exp()


def reveal_factor(sampler: str, schedule: Schedule, time: float, earlier: float) -> float:
    """What A is multiplied by for the probability that a token masked at `time` is revealed at `earlier` < `time`.

    analytic: (alpha(s) - alpha(t)) / (1 - alpha(t)), exact for exact scores; euler: (t - s) times the reverse rate at t.
    """
    before, after = np.asarray(time), np.asarray(earlier)
    if sampler == "euler":
        return float((before - after) * schedule.weight(before))
    return float(1.0 - schedule.mask_probability(after) / schedule.mask_probability(before))
