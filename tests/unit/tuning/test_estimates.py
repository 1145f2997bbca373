"""The exact bound of small blocks, and statistics that do not care how rows are spread over ranks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.tuning.estimates import Moments, combine, per_token, perplexity
from tests.unit.objectives.exact_bound import exact_block_nelbo

VOCABULARY = 3
MASK = VOCABULARY


def _conditionals_of(joint: np.ndarray, noised: np.ndarray) -> np.ndarray:
    """log p(token i = v | the unmasked tokens of the block) under a joint distribution, [k, n, V]."""
    size = joint.ndim
    result = np.zeros((len(noised), size, VOCABULARY))
    for row, block in enumerate(noised):
        for i, v in itertools.product(range(size), range(VOCABULARY)):
            known = tuple(int(token) if token != MASK else slice(None) for token in block)
            there = tuple(v if j == i else known[j] for j in range(size))
            result[row, i, v] = np.log(joint[there].sum()) - np.log(joint[known].sum())
    return result


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_model_with_true_conditionals_reaches_the_likelihood(size: int) -> None:
    """The bound averages the chain rule over all orders: with conditionals of one joint it is -log p(x), for every x."""
    joint = np.random.default_rng(size).dirichlet(np.ones(VOCABULARY**size)).reshape((VOCABULARY,) * size)
    for tokens in itertools.islice(itertools.product(range(VOCABULARY), repeat=size), 0, None, 5):
        value = exact_block_nelbo(lambda noised: _conditionals_of(joint, noised), np.array(tokens), MASK)
        assert value == pytest.approx(-math.log(joint[tokens]), rel=1e-12)


def test_the_parts_of_the_unit_interval_add_up() -> None:
    table = np.log(np.random.default_rng(0).dirichlet(np.ones(VOCABULARY), size=(4**5, 5)))

    def log_probabilities(noised: np.ndarray) -> np.ndarray:
        return table[noised @ 4 ** np.arange(5)]

    tokens = np.array([0, 2, 1, 1, 0])
    whole = exact_block_nelbo(log_probabilities, tokens, MASK)
    edges = (0.0, 1e-3, 0.3, 0.8, 1.0)
    parts = [exact_block_nelbo(log_probabilities, tokens, MASK, bounds) for bounds in itertools.pairwise(edges)]
    assert sum(parts) == pytest.approx(whole, rel=1e-12)
    assert min(parts) > 0
    # As p -> 0 only single masks are left, each with weight 1/p: the integrand is the sum of the n leave-one-out losses.
    alone = sum(-log_probabilities(np.where(np.arange(5) == i, MASK, tokens)[None])[0, i, tokens[i]] for i in range(5))
    assert exact_block_nelbo(log_probabilities, tokens, MASK, (0.0, 1e-6)) == pytest.approx(1e-6 * alone, rel=1e-4)


def test_longer_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 6 tokens, got 7"):
        exact_block_nelbo(lambda noised: np.zeros((*noised.shape, VOCABULARY)), np.zeros(7, int), MASK)


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), min_size=1, max_size=5), st.sampled_from([0.0, 1e7]))
def test_moments_of_parts_are_moments_of_the_whole(parts: list[list[float]], offset: float) -> None:
    """Any spread of rows over ranks, empty ranks included; also where sums of squares would cancel."""
    arrays = [np.array(part, np.float64) + offset for part in parts]
    values = np.concatenate(arrays)
    joined = combine(map(Moments.of, arrays))
    assert joined.count == values.size
    if values.size:
        assert joined.mean == pytest.approx(values.mean(), rel=1e-12, abs=1e-9)
        assert joined.m2 == pytest.approx(np.square(values - values.mean()).sum(), rel=1e-6, abs=1e-6)


def test_nats_per_token_of_rows_that_are_not_alike() -> None:
    """All losses over all tokens. Where rows are alike it is the mean of rows with its error; where not, it is that of repetitions."""
    numbers = np.random.default_rng(0)
    losses = numbers.normal(20.0, 3.0, 40)
    mean, error = per_token(losses, np.full(40, 8))
    assert mean == pytest.approx(losses.mean() / 8) and error == pytest.approx((losses / 8).std(ddof=1) / math.sqrt(40))
    tokens = numbers.integers(0, 30, (4000, 50))
    found = np.array([per_token(numbers.normal(2.0 * row, 1.0 + row), row) for row in tokens])
    assert found[:, 0].mean() == pytest.approx(2.0, abs=4 * found[:, 0].std() / math.sqrt(4000))
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.05)
    assert math.isnan(per_token(np.ones(1), np.ones(1))[1])
    with pytest.raises(ValueError, match="no tokens"):
        per_token(np.zeros(2), np.zeros(2))


def test_moments_of_many_statistics_at_once() -> None:
    """Arrays of moments (one entry per interval of the tuner) join entry by entry, empty entries included."""
    rng = np.random.default_rng(0)
    groups = [[rng.normal(size=count) for count in counts] for counts in ((3, 0, 1), (2, 0, 0), (0, 5, 4))]
    ranks = [[Moments.of(values) for values in rank] for rank in groups]
    stacked = [Moments(*(np.array([getattr(m, name) for m in rank]) for name in ("count", "mean", "m2"))) for rank in ranks]
    joined = combine(stacked)
    for column in range(3):
        single = combine(rank[column] for rank in ranks)
        for name in ("count", "mean", "m2"):
            assert getattr(joined, name)[column] == pytest.approx(float(getattr(single, name)), rel=1e-12)


def test_perplexity() -> None:
    assert perplexity(math.log(30.6)) == pytest.approx(30.6)
    assert perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))
