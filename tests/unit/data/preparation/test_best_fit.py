"""Best fit: everything in one place, nothing cut that fits, close to the fewest rows, window by window."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.preparation import best_fit as module
from bd3_scale.data.preparation.best_fit import best_fit


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 16), st.integers(1, 5))
def test_every_token_is_in_one_row_and_only_long_documents_are_cut(lengths: list[int], payload: int, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", window)
        pieces = best_fit(np.array(lengths), payload)
    row, document, first, last = pieces.T
    for number, length in enumerate(lengths):
        of_one = sorted(zip(first[document == number].tolist(), last[document == number].tolist(), strict=True))
        borders = [*range(0, length, payload), length]
        assert of_one == list(pairwise(borders)), "cut at full rows alone"
    room = np.bincount(row, last - first)
    assert (room > 0).all() and room.max() <= payload and (np.diff(row) >= 0).all()
    opening = [document[row == one].min() for one in range(len(room))]
    if sum(lengths) <= window * payload:  # one window
        assert opening == sorted(opening), "in the order of the first document of each"


def test_few_rows() -> None:
    """First-fit of the stream would leave a third of the rows' second halves empty; the longest first does not."""
    lengths = np.random.default_rng(0).integers(1, 101, 20_000)
    rows = int(best_fit(lengths, 100)[-1, 0]) + 1
    assert rows < 1.02 * lengths.sum() / 100
