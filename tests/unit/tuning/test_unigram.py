"""The unigram perplexity against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bd3_scale.tuning.estimates import unigram_perplexity


def test_by_hand() -> None:
    train, validation = np.array([[3, 0, 0, 1]]), np.array([[3, 0, 2], [3, 1, 1]])
    # counts + 1 of ids 0..3, position 0 left out: 3, 2, 1, 1 of 7
    expected = math.exp(-(math.log(3 / 7) + math.log(1 / 7) + 2 * math.log(2 / 7)) / 4)
    assert unigram_perplexity(train, validation, 4) == pytest.approx(expected, rel=1e-12)


def test_uniform_text_has_the_size_of_its_vocabulary() -> None:
    rows = np.random.default_rng(0).integers(0, 50, (2000, 101))
    assert unigram_perplexity(rows, rows[:100], 50) == pytest.approx(50, rel=1e-2)
