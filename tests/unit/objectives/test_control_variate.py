"""The control variate: it has no mean, whatever it believes of the network, and less variance is left where that is right."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from bd3_scale.objectives.control_variate import _mean, control
from bd3_scale.objectives.loss_profile import POOLS, count_sums, masked_nll
from bd3_scale.objectives.network_inputs import scored_rows
from bd3_scale.objectives.noise import LINEAR
from bd3_scale.objectives.table import BlockDiffusion
from tests.unit.tuning.test_interval_tuner import MASK, WHOLE, _nll, _rows, _samples

ANY = tuple(np.random.default_rng(0).uniform(0, 5, POOLS).tolist())


@pytest.mark.parametrize("learned", [(), (3, 0, 1)])
@pytest.mark.parametrize("interval", [WHOLE, (0.3, 0.8)])
def test_its_mean_is_nothing(learned: tuple[int, ...], interval: tuple[float, float]) -> None:
    """By quadrature over the position that t is drawn from, and enumeration of the masks of a row's second block."""
    size = 3
    objective = BlockDiffusion(MASK, 2 * size, size, interval, learned=learned)
    masks = (np.arange(2**size)[:, None] >> np.arange(size)) & 1 == 1
    nodes, shares = np.polynomial.legendre.leggauss(8)
    expected = 0.0
    for start, end in pairwise(np.concatenate([[0.0], np.cumsum(objective.times.probabilities)])):
        times, corrections = objective.times.draw(start + (end - start) * (nodes + 1) / 2)
        for t, correction, share in zip(times, corrections, shares * (end - start) / 2, strict=True):
            for mask in masks:
                masked, at = np.concatenate([np.zeros(size, bool), mask])[None], np.full((1, 2), t)
                inputs = objective._inputs(
                    np.zeros((1, 2 * size)), masked, at, LINEAR, np.zeros(1, np.int64), objective.pattern, np.full((1, 2), correction)
                )
                expected += share * np.where(mask, t, 1 - t).prod() * control(inputs, 1, ANY, interval)
    first = (size - 1) * _mean(ANY, size - 1, interval)  # the first block, whose token 0 is never scored, has no masks here
    assert expected == pytest.approx(-first, rel=1e-6)


def test_what_is_left_of_a_loss_varies_less() -> None:
    objective, batch, steps, indices = BlockDiffusion(MASK, 64, 8, learned=(2, 3)), 6, 200, np.arange(300)
    means = masked_nll(count_sums(_samples(objective, _rows(300, 64), indices)).sum(0))
    losses, left = np.empty(steps), np.empty(steps)
    for step in range(steps):
        rows = np.random.default_rng(step).integers(0, MASK, (batch, 64))
        inputs = scored_rows(objective.training_inputs(rows, np.arange(batch), step, 0, batch), batch - 1)  # the last row is filler
        losses[step] = float((inputs.weights * torch.nan_to_num(_nll(inputs, 8))).sum())
        left[step] = losses[step] - control(inputs, batch - 1, means, objective.interval)
    assert left.var() < 0.5 * losses.var()
    difference = losses - left
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(steps)


def test_full_masking_leaves_nothing_to_explain() -> None:
    """L' = 1 at t = 1: the same masks at every step."""
    for draws in (1, 3):
        objective = BlockDiffusion(MASK, 12, 1, (1.0, 1.0), masked_nll=ANY, draws=draws)
        inputs = objective.training_inputs(_rows(4, 12), np.arange(4), 0, 0, 4)
        assert objective.control(inputs, 4) == pytest.approx(0.0, abs=1e-9)
    assert BlockDiffusion(MASK, 12, 1).control(inputs, 4) == 0.0
