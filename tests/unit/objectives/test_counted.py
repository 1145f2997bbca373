"""Which tokens are masked, scored and counted where some of them do not count: every kind, every block size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.data.counted import counted, ids, uncounted
from bd3_scale.objectives.network_inputs import NetworkInputs, row_losses, row_nelbo
from bd3_scale.objectives.table import Autoregressive, BlockDiffusion, MaskedDiffusion, ScoreEntropy, SimplexDiffusion

MASK, LENGTH = 9, 24
KINDS: dict[str, Any] = {
    "bd3": lambda size: BlockDiffusion(MASK, LENGTH, size),
    "2 draws": lambda size: BlockDiffusion(MASK, LENGTH, size, draws=2),
    "resampled": lambda size: BlockDiffusion(MASK, LENGTH, max(4, size), (0.3, 0.8), resample=True),
    "mdlm": lambda size: MaskedDiffusion(MASK, LENGTH),
    "sedd": lambda size: ScoreEntropy(MASK, LENGTH),
    "ssdlm": lambda size: SimplexDiffusion(MASK, LENGTH, size),
    "ar": lambda size: Autoregressive(MASK, LENGTH),
}


def rows_of(prompts: list[int], answers: list[int]) -> np.ndarray:
    """A prompt, an answer, and filling behind it, in each row."""
    rows = np.random.default_rng(0).integers(1, MASK, (len(prompts), LENGTH))
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        row[1 : 1 + prompt] = uncounted(row[1 : 1 + prompt])
        row[1 + prompt + answer :] = uncounted(np.int64(0))
    return rows


def scored(inputs: NetworkInputs) -> np.ndarray:
    """bool [m, L]: the tokens that are predicted, in any draw."""
    pattern, real = inputs.pattern, inputs.weights > 0
    place = inputs.selected[real] + (pattern.kind == "causal")
    found = np.zeros((len(inputs.tokens), pattern.draws * LENGTH), bool)
    found.ravel()[place.numpy()] = True
    return found.reshape(len(found), pattern.draws, LENGTH).any(1)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([1, 4, 8, 24]),
    st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23)), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_prompts_stay_clean_and_nothing_but_the_end_of_the_last_block_is_added(
    kind: str, size: int, lengths: list[tuple[int, int]], seed: int
) -> None:
    objective = KINDS[kind](size)
    prompts, answers = [one for one, _ in lengths], [min(other, 23 - one) for one, other in lengths]
    rows, slots = rows_of(prompts, answers), np.arange(len(lengths))
    block = objective.pattern.block_size
    for inputs in (objective.training_inputs(rows, slots, 3, seed, len(rows)), objective.validation_inputs(rows, slots, seed)):
        found = scored(inputs)
        clean = inputs.tokens[:, :LENGTH].numpy() == ids(rows)
        assert inputs.counted.tolist() == answers == counted(rows).sum(1).tolist()
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = 1 + prompt + answer
            last = end if not answer else -(-end // block) * block
            assert not found[row, : 1 + prompt].any() and not found[row, last:].any()
            assert clean[row, : 1 + prompt].all() and clean[row, last:].all(), "known, or of no block that is denoised"
            assert inputs.denoised[row].sum() == (last - 1 - prompt if answer else 0)
            if kind in ("ar", "ssdlm"):
                assert found[row, 1 + prompt : last].all()
    if inputs.simplex is not None:
        noisy = inputs.simplex.spread.numpy() > 0
        assert not noisy[~found].any()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_where_all_tokens_count_nothing_is_new(kind: str) -> None:
    """The same inputs as of rows whose first token is marked, which never counts anyway."""
    objective, rows = KINDS[kind](4), np.random.default_rng(0).integers(0, MASK, (3, LENGTH))
    marked = rows.copy()
    marked[:, 0] = uncounted(marked[:, 0])
    one, other = (objective.training_inputs(given, np.arange(3), 1, 0, 3) for given in (rows, marked))
    for name in ("tokens", "selected", "targets", "weights"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)
    assert one.counted.tolist() == [LENGTH - 1] * 3 and one.denoised.sum() == 3 * (LENGTH - 1)


def test_nats_are_per_token_that_counts() -> None:
    objective, rows = BlockDiffusion(MASK, LENGTH, 4), rows_of([3, 0, 5], [8, 11, 0])
    inputs = objective.validation_inputs(rows, np.arange(3), 0)
    losses = row_losses(inputs, torch.ones(len(inputs.selected)))
    np.testing.assert_allclose(row_nelbo(inputs, torch.ones(len(inputs.selected))), [losses[0] / 8, losses[1] / 11, np.nan])
    assert losses[2] == 0
