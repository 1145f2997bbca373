"""Several draws of a row: each is a row of its own with the noise of its index; pairs complement each other and change no mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bd3_scale.errors import RecipeError
from bd3_scale.objectives import noise
from bd3_scale.objectives.bd3 import BlockDiffusion
from bd3_scale.objectives.draws import NoisyRows, fold
from bd3_scale.objectives.network_inputs import NetworkInputs, block_losses, scored_rows
from bd3_scale.objectives.ssdlm import SimplexDiffusion
from bd3_scale.objectives.table import ObjectiveSchedule
from bd3_scale.recipe.schema import ObjectiveConfig
from tests.unit.objectives.test_objectives import TabularModel

MASK, LENGTH, BATCH, SEED = 3, 12, 5, 7
OBJECTIVES = {
    "bd3": BlockDiffusion(MASK, LENGTH, 4),
    "documents": BlockDiffusion(MASK, LENGTH, 4, (0.3, 0.8), document_end=0, pad_to=8),
    "resampled": BlockDiffusion(MASK, LENGTH, 4, (0.2, 0.8), resample=True),
    "one block": BlockDiffusion(MASK, LENGTH, LENGTH),
    "ssdlm": SimplexDiffusion(MASK, LENGTH, 4),
}
ROWS = np.random.default_rng(0).integers(0, MASK, (BATCH, LENGTH))


def masked(inputs: NetworkInputs) -> np.ndarray:
    """bool [m, draws, L]."""
    pattern = inputs.pattern
    tokens = inputs.tokens[:, : pattern.scored_rows].numpy()
    return tokens.reshape(len(tokens), pattern.draws, pattern.length) == MASK


@pytest.mark.parametrize("draws", [2, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_draw_is_a_row_with_the_noise_of_its_index(name: str, draws: int) -> None:
    """Against the objective of one draw, whose batch has every row `draws` times."""
    slots = np.array([4, 0, 2])
    inputs = replace(OBJECTIVES[name], draws=draws).training_inputs(ROWS[slots], slots, 3, SEED, BATCH)
    of_draws = (slots[:, None] * draws + np.arange(draws)).ravel()
    single = OBJECTIVES[name].training_inputs(np.repeat(ROWS[slots], draws, axis=0), of_draws, 3, SEED, BATCH * draws)
    pattern, shape = inputs.pattern, (len(slots), draws * LENGTH)
    assert inputs.tokens.shape == (3, pattern.rows) and pattern.rows == draws * LENGTH + single.pattern.clean_rows
    assert torch.equal(inputs.tokens[:, : draws * LENGTH], single.tokens[:, :LENGTH].reshape(shape))
    assert torch.equal(inputs.tokens[:, draws * LENGTH :], single.tokens[::draws, LENGTH:]), "the clean half, once"
    assert inputs.positions.tolist() == [row % LENGTH for row in range(pattern.rows)]
    for value in ("selected", "targets", "weights"):
        assert torch.equal(getattr(inputs, value), getattr(single, value)), value
    if single.segments is not None and inputs.segments is not None:
        assert torch.equal(inputs.segments[:, : draws * LENGTH], single.segments[:, :LENGTH].reshape(shape))
    if single.simplex is not None and inputs.simplex is not None and single.noise_levels is not None:
        assert inputs.noise_levels is not None and torch.equal(inputs.noise_levels.flatten(), single.noise_levels.flatten())
        assert all(torch.equal(*parts) for parts in zip(inputs.simplex.flat(), single.simplex.flat(), strict=True))
    assert replace(OBJECTIVES[name], draws=draws).scored_tokens_per_row == draws * (LENGTH - 1)
    held_out, expected = (
        objective.validation_inputs(ROWS[slots], slots, SEED) for objective in (replace(OBJECTIVES[name], draws=draws), OBJECTIVES[name])
    )
    assert held_out.pattern == expected.pattern and torch.equal(held_out.tokens, expected.tokens), "validation draws once"


def test_filler_is_left_out_with_all_its_draws() -> None:
    inputs = replace(OBJECTIVES["bd3"], draws=2).training_inputs(ROWS, np.arange(BATCH), 0, SEED, BATCH)
    kept = scored_rows(inputs, 2).weights > 0
    assert kept.sum() == masked(inputs)[:2].sum() > 0 and not kept[inputs.selected >= 4 * LENGTH].any()


@pytest.mark.parametrize("pairs", ["independent", "antithetic", "complement"])
def test_strata_run_over_all_draws(pairs: str) -> None:
    rows, blocks, draws, interval = 6, 5, 4, (0.25, 0.75)
    noisy = NoisyRows.of(np.arange(rows), rows, draws, pairs)
    times = noise.block_times(SEED, 2, noisy.slots, noisy.batch, blocks, interval, noisy.mirrored, fold(pairs, interval))
    count, times_each = (rows * blocks * draws, 1) if pairs == "independent" else (rows * blocks * draws // 2, 2)
    stratum = np.floor((times - 0.25) / 0.5 * count).astype(int).ravel()
    assert np.bincount(stratum, minlength=count).tolist() == [times_each] * count
    if pairs != "independent":
        of_pairs = times.reshape(rows, 2, 2, blocks)
        np.testing.assert_allclose(of_pairs[:, :, 0] + of_pairs[:, :, 1], 1.0, atol=1e-15)


@pytest.mark.parametrize(
    ("pairs", "interval"),
    [
        ("antithetic", (0.3, 0.8)),
        ("antithetic", (0.6, 0.9)),
        ("complement", (0.2, 0.8)),
        ("complement", (0.3, 0.8)),
        ("complement", (0.1, 0.6)),
        ("complement", (0.6, 0.9)),
    ],
)
def test_each_draw_of_a_pair_is_unbiased_by_enumeration(pairs: str, interval: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """All times and all numbers of two tokens, on grids on which a token's mask has exactly its probability.

    The loss of two tokens is linear in t, so that the mean over the middles of strata is the integral over the interval.
    """
    times, grid = round((interval[1] - interval[0]) / 0.05), 40
    count = times * grid**2  # pairs; pair i has time i // grid^2 and the numbers (i // grid % grid, i % grid)
    row, model = np.array([1, 0, 2]), TabularModel(1, 3)

    def words(seed: int, purpose: str, indices: tuple[int, ...], length: int) -> np.ndarray:
        if purpose != "mask":
            return np.zeros(length, np.uint64)
        numbers = [0, indices[1] // grid % grid, indices[1] % grid]
        return np.array([(2 * number + 1) * 2**64 // (2 * grid) for number in numbers], np.uint64)

    monkeypatch.setattr(noise, "raw_words", words)
    monkeypatch.setattr(noise, "_strata", lambda seed, step, total: np.arange(total) // grid**2 * grid**2 + grid**2 // 2)
    objective = BlockDiffusion(MASK, 3, 3, interval, draws=2, pairs=pairs)
    inputs = objective.training_inputs(np.tile(row, (count, 1)), np.arange(count), 0, 0, count)
    of_draws = {"tokens": inputs.tokens.reshape(-1, 3), "denoised": inputs.denoised.repeat(2, axis=0)}
    alone = replace(inputs, pattern=replace(inputs.pattern, draws=1), **of_draws)
    losses = block_losses(alone, model.nll(alone)).reshape(count, 2)
    exact = model.exact(row, interval)[0] / (interval[1] - interval[0])
    np.testing.assert_allclose(losses.mean(0), exact, rtol=1e-6)
    masks, spread = masked(inputs), [losses[:, 0].std(), losses.mean(1).std()]
    assert spread[1] < 0.7 * spread[0], "less than of two independent draws"
    if pairs == "complement" and sum(interval) == 1.0:
        assert (masks[:, 0] ^ masks[:, 1])[:, 1:].all(), "each token once"


@pytest.mark.parametrize(
    ("interval", "resample"),
    [((0.2, 0.8), False), ((0.2, 0.8), True), ((0.3, 0.8), False), ((0.1, 0.6), False), ((1e-3, 1.0), False), ((0.1, 0.4), False)],
)
def test_the_second_masks_what_the_first_leaves(interval: tuple[float, float], resample: bool) -> None:
    """Wherever t and 1 - t lie in the interval; elsewhere t is reflected where 1 - t is not."""
    rows, draws, size = 40, 4, 8
    objective = BlockDiffusion(MASK, 64, size, interval, draws=draws, pairs="complement", resample=resample)
    inputs = objective.training_inputs(np.zeros((rows, 64), np.int64), np.arange(rows), 0, SEED, rows)
    noisy = NoisyRows.of(np.arange(rows), rows, draws, "complement")
    every = noise.block_times(SEED, 0, noisy.slots, noisy.batch, 8, interval, noisy.mirrored, fold("complement", interval))
    first, second = every.reshape(rows, 2, 2, 8).swapaxes(0, 2).reshape(2, -1)[..., None].repeat(size, -1)
    masks = masked(inputs).reshape(rows, 2, 2, 8, size).swapaxes(0, 2).reshape(2, -1, size)
    spared = np.zeros((2, rows, 8, size), bool)  # [pair of draws, row, ...] as above; token 0 is never masked
    spared[:, :, 0, 0] = True
    spared = spared.reshape(-1, size)
    low, high = max(interval[0], 1 - interval[1]), min(interval[1], 1 - interval[0])
    inside = (first >= low) & (first <= high)
    assert inside.any() == (low <= high)
    np.testing.assert_allclose((first + second)[inside], 1.0, atol=1e-12)
    assert np.array_equal((masks[0] ^ masks[1])[inside], ~spared[inside])
    assert not ((second[~inside] > low + 1e-12) & (second[~inside] < high - 1e-12)).any()
    assert second.min() >= interval[0] and second.max() <= interval[1]


def test_what_cannot_be_is_refused() -> None:
    for wrong, said in (
        ({"draws": 3, "pairs": "antithetic"}, "set objective.draws=4"),
        ({"draws": 2, "pairs": "complement", "noise_schedule": "cosine"}, "set objective.pairs=antithetic"),
        ({"draws": 2, "pairs": "complement", "density": "beta"}, "set objective.pairs=antithetic or objective.density=uniform"),
        ({"kind": "mdlm", "draws": 2}, "objective.draws is 2, which means nothing to objective.kind=mdlm"),
        ({"kind": "ar", "draws": 2}, "objective.draws is 2, which means nothing to objective.kind=ar"),
        ({"kind": "ssdlm", "draws": 2, "pairs": "antithetic"}, "objective.pairs is 'antithetic', which means nothing"),
    ):
        with pytest.raises(RecipeError, match=said):
            ObjectiveSchedule(ObjectiveConfig(**wrong), LENGTH, MASK)
