"""The control variate of the reported train loss: how much of a step's loss its masks alone explain.

A block of whose n tokens m are masked has the loss weight * S, S: the sum of their nll, m * nll(m / n) in the mean, which the tuner's pass
measures. The train loss with every nll replaced by that mean is known before the step, and so is its expectation: what is left when their
difference is subtracted has the same mean and less variance. Gradients never see it. (The mean loss at a block's t alone explains nothing:
t is drawn in strata, so that its part of the sum hardly varies; the number of masked tokens does.)

Invariants: an unbiased train loss stays unbiased, however wrong the means are; nothing but host numbers; filler rows add nothing.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bd3_scale.objectives.loss_profile import LossProfile, pools
from bd3_scale.objectives.network_inputs import NetworkInputs, masked_counts, weight_sums
from bd3_scale.rules.objective import Interval


def control(inputs: NetworkInputs, real: int, masked_nll: tuple[float, ...], interval: Interval) -> float:
    """Of the summed loss of the first `real` rows of training inputs whose other rows are not scored, in nats; linear schedule.

    `masked_nll`: mean nll of a masked token, of every pool of masked fractions (`loss_profile.pools`).
    """
    maskable = np.repeat(inputs.denoised, inputs.pattern.draws, axis=0)
    fraction = masked_counts(inputs) / np.maximum(maskable, 1)
    known = (weight_sums(inputs) * np.asarray(masked_nll)[pools(fraction)]).sum()
    sizes, counts = np.unique(maskable[: real * inputs.pattern.draws], return_counts=True)
    mean = sum(count * size * _mean(masked_nll, int(size), interval) for size, count in zip(sizes, counts, strict=True))
    return float(known - mean)


@lru_cache(maxsize=16)
def _mean(masked_nll: tuple[float, ...], size: int, interval: Interval) -> float:
    """Of the mean loss of a block of `size` maskable tokens at t ~ U[beta, omega], nats per token."""
    if size == 0:
        return 0.0
    counts = np.arange(size + 1)
    first = np.asarray(masked_nll)[pools(counts / size)] * counts
    return LossProfile(size, first, np.zeros_like(first)).mean(interval)
