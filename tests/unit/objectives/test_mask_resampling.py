"""Resampled masks: counts from the truncated binomial, uniform subsets, and the fraction inside the interval without fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.errors import RecipeError
from bd3_scale.objectives import noise
from bd3_scale.objectives.mask_resampling import admissible_counts, importance, resampled_tokens, truncated_counts
from bd3_scale.objectives.network_inputs import counted_tokens
from bd3_scale.objectives.noise import SCHEDULES
from bd3_scale.objectives.table import BlockDiffusion, MaskedDiffusion, ObjectiveSchedule
from bd3_scale.recipe.schema import ObjectiveConfig


def _binomial(size: int, p: float) -> np.ndarray:
    return np.array([math.comb(size, m) * p**m * (1 - p) ** (size - m) for m in range(size + 1)])


@pytest.mark.parametrize("p", [0.3, 0.55, 0.8])
@pytest.mark.parametrize(("size", "interval"), [(16, (0.3, 0.8)), (4, (0.3, 0.8)), (15, (1e-3, 1.0)), (40, (0.25, 0.85))])
def test_counts_are_truncated_binomial(size: int, interval: tuple[float, float], p: float) -> None:
    draws = 20000
    counts = truncated_counts(np.random.default_rng(size).random(draws), np.full(draws, p), size, interval)
    inside = [m for m in range(size + 1) if interval[0] - 1e-9 <= m / size <= interval[1] + 1e-9]
    expected = _binomial(size, p)[inside]
    expected *= draws / expected.sum()
    observed = np.bincount(counts, minlength=size + 1)
    assert observed[inside].sum() == draws
    common = expected > 5
    statistic = (np.square(observed[inside] - expected)[common] / expected[common]).sum()
    freedom = common.sum() - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom), f"chi-square {statistic:.1f} with {freedom} degrees of freedom"
    assert observed[inside][~common].sum() <= 5 * max(1, (~common).sum())


def test_bounds_of_the_counts() -> None:
    """Fractions that floats miss by a hair are inside; where no count fits, all may be."""
    assert admissible_counts(20, (0.55, 0.85)) == (11, 17) and admissible_counts(20, (0.15, 0.65)) == (3, 13)
    assert admissible_counts(16, (1e-3, 1.0)) == (1, 16) and admissible_counts(16, (0.0, 0.5)) == (0, 8)
    assert admissible_counts(1, (0.3, 0.8)) == (0, 1) and admissible_counts(1, (0.5, 1.0)) == (1, 1)
    # The ends of the unit interval, and the smallest and largest number a stream can give.
    ends = np.array([0.0, 1 - 2.0**-53])
    assert truncated_counts(ends, np.array([0.0, 1.0]), 6, (0.0, 1.0)).tolist() == [0, 6]
    assert truncated_counts(ends, np.array([0.5, 0.5]), 6, (0.3, 0.7)).tolist() == [2, 4]
    assert truncated_counts(ends, np.array([1e-3, 1e-3]), 1024, (1e-3, 1.0)).tolist()[0] == 2


def test_every_subset_of_a_size_is_equally_probable() -> None:
    slots = np.arange(12000)
    masked = noise.masked_subsets(0, 0, slots, np.full((len(slots), 2), 2), np.tile(np.arange(8) > 0, (len(slots), 1)), 4)
    assert not masked[:, 0].any()
    for columns, subsets in ((slice(1, 4), 3), (slice(4, 8), 6)):
        codes = masked[:, columns] @ (1 << np.arange(columns.stop - columns.start))
        observed = np.unique(codes, return_counts=True)[1]
        assert len(observed) == subsets
        statistic = np.square(observed - len(slots) / subsets).sum() / (len(slots) / subsets)
        assert statistic < 22.1, f"chi-square {statistic:.1f} with {subsets - 1} degrees of freedom"


@settings(max_examples=60)
@given(
    st.sampled_from([(8, 2), (12, 4), (32, 16), (16, 16)]),
    st.sampled_from([(0.3, 0.8), (0.45, 0.95), (1e-3, 0.5), (1e-3, 1.0)]),
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(0, 10**6),
)
def test_training_keeps_every_block_inside(shape: tuple[int, int], interval: tuple[float, float], schedule: str, step: int) -> None:
    length, block_size = shape
    objective = BlockDiffusion(9, length, block_size, interval, noise_schedule=schedule, resample=True)
    rows, slots = np.ones((6, length), np.int64), np.arange(6)
    masked = objective.training_inputs(rows, slots, step, 0, 6).tokens[:, :length].numpy() == 9
    assert not masked[:, 0].any()
    sizes = counted_tokens(objective.pattern)
    fractions = masked.reshape(6, -1, block_size).sum(-1) / sizes
    low, high = SCHEDULES[schedule].mask_probability(np.array(interval))
    fitting = [any(low <= m / size <= high for m in range(size + 1)) for size in sizes]
    inside = (fractions >= low - 1e-9) & (fractions <= high + 1e-9)
    assert inside[:, fitting].all()
    # The noise of a slot does not depend on who asks for it.
    alone = objective.training_inputs(rows[:2], slots[[4, 1]], step, 0, 6).tokens[:, :length].numpy() == 9
    np.testing.assert_array_equal(alone, masked[[4, 1]])


def test_only_training_resamples() -> None:
    """Validation and the draws of t are those of the plain objective; resampled masks are another draw, pinned here."""
    rows = np.ones((3, 16), np.int64)
    plain, resampled = (BlockDiffusion(9, 16, 8, (0.3, 0.8), resample=on) for on in (False, True))
    for name in ("tokens", "weights", "selected"):
        np.testing.assert_array_equal(
            getattr(plain.validation_inputs(rows, np.arange(3), 0), name), getattr(resampled.validation_inputs(rows, np.arange(3), 0), name)
        )
    weights = [set(of.training_inputs(rows, np.arange(3), 2, 0, 3).weights.tolist()) for of in (plain, resampled)]
    assert weights[0] == weights[1] and len(weights[0]) == 6
    drawn = resampled_tokens(0, 5, np.arange(2), np.full((2, 2), 0.5), np.tile(np.arange(16) > 0, (2, 1)), 8, (0.3, 0.8))
    assert drawn.astype(int).tolist() == PINNED
    one_block = MaskedDiffusion(9, 16, (0.3, 0.8), resample=True).training_inputs(rows, np.arange(3), 2, 0, 3)
    assert all(5 <= count <= 12 for count in (one_block.tokens.numpy() == 9).sum(1))


PINNED = [[0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1]]
"""A resampled mask as it was first drawn: if it changes, resumed runs become other runs."""


def test_importance_is_the_ratio_of_the_two_distributions_of_the_count() -> None:
    """Against sums over many t, for intervals with every kind of bound."""
    size, intervals = 6, ((1e-3, 1.0), (0.3, 0.8), (1e-3, 0.5), (0.45, 0.95))
    table = importance(size, intervals)

    def moments(interval: tuple[float, float], low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        edges = np.geomspace(*interval, 20001)
        t, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / (interval[1] - interval[0])
        joint = np.stack([_binomial(size, p) for p in t])
        joint[:, :low], joint[:, high + 1 :] = 0, 0
        joint *= (width / joint.sum(1))[:, None]
        return joint.sum(0), (joint / t[:, None]).sum(0), (joint / t[:, None] ** 2).sum(0)

    seen = moments((1e-3, 1.0), 0, size)[0]
    for k, interval in enumerate(intervals):
        low, high = admissible_counts(size, interval)
        probability, inverse, square = moments(interval, low, high)
        inside = slice(low, high + 1)
        np.testing.assert_allclose(table.weight[:, k], probability / seen, rtol=1e-6)
        np.testing.assert_allclose(table.inverse_time[inside, k], inverse[inside] / probability[inside], rtol=1e-6)
        variance = square[inside] / probability[inside] - np.square(inverse[inside] / probability[inside])
        np.testing.assert_allclose(table.inverse_time_variance[inside, k], variance, rtol=1e-4)
    big = importance(1023, ((0.45, 0.95),))
    assert big.weight.max() < 2.5 and np.isfinite(big.inverse_time).all(), "the weights are bounded"


def test_what_is_refused() -> None:
    for config, message in (
        (ObjectiveConfig(block_size=1, resample=True), "objective.resample is on, but a block of one token"),
        (ObjectiveConfig(kind="ar", resample=True), "objective.resample is True, which means nothing to objective.kind=ar"),
    ):
        with pytest.raises(RecipeError, match=message):
            ObjectiveSchedule(config, 16, 5)
