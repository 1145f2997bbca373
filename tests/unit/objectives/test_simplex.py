"""Gaussian noise on words: its distribution, what it depends on, and the rows that SSD-LM trains on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bd3_scale.errors import DataError, RecipeError
from bd3_scale.keyed_random import generator, normals
from bd3_scale.objectives import noise
from bd3_scale.objectives.network_inputs import block_losses, row_nelbo
from bd3_scale.objectives.simplex import K, SimplexNoise, conditioning_times, masses, remaining_signal
from bd3_scale.objectives.table import BlockDiffusion, ObjectiveSchedule, SimplexDiffusion
from bd3_scale.recipe.schema import ObjectiveConfig, TunerConfig
from bd3_scale.rules.objective import check_tuner

MASK, LENGTH, SIZE = 11, 12, 3
KEYS = torch.from_numpy(noise.simplex_keys(3, 5, np.arange(40), 50)).flatten()


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, MASK, (count, LENGTH))


# -- The noise ---------------------------------------------------------------------------------------------------------


def test_numbers_are_standard_normal_and_independent() -> None:
    """Mean, variance, fourth moment, tails, and correlations between neighbours, partners of one word, and keys; 5 standard errors."""
    drawn = normals(KEYS, 0, 1000).double()
    count = drawn.numel()
    assert abs(drawn.mean()) < 5 / math.sqrt(count)
    assert abs(drawn.square().mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs(drawn.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)
    for border in (1.0, 2.0, 3.0, 4.0):
        expected = math.erfc(border / math.sqrt(2))
        assert abs((drawn.abs() > border).double().mean() - expected) < 5 * math.sqrt(expected / count)
    pairs = {
        "partners": (drawn[:, 0::2], drawn[:, 1::2]),
        "neighbours": (drawn[:, 1:-1:2], drawn[:, 2::2]),
        "keys": (drawn[1:], drawn[:-1]),
    }
    for name, (a, b) in pairs.items():
        for f, g in ((a, b), (a.square() - 1, b.square() - 1)):
            spread = float((f * g).std())
            assert abs(float((f * g).mean())) < 5 * spread / math.sqrt(f.numel()), name


def test_any_part_of_a_row_can_be_made_by_itself() -> None:
    whole = normals(KEYS[:7], 0, 31)
    for first, last in ((0, 31), (1, 2), (3, 30), (4, 4), (30, 31), (7, 20)):
        assert torch.equal(normals(KEYS[:7], first, last), whole[:, first:last])
    assert torch.equal(normals(KEYS[[4, 2]], 5, 9), whole[[4, 2], 5:9])


def test_extreme_keys_give_finite_numbers() -> None:
    keys = torch.tensor([0, -1, 1, 2**63 - 1, -(2**63)])
    drawn = normals(keys, 0, 2000)
    assert drawn.isfinite().all() and drawn.abs().max() < 6.7 and len(drawn.unique(dim=0)) == 5


def test_golden_numbers() -> None:
    """Words by SplitMix64's own definition, in Python's integers; normal numbers by Box and Muller in float64."""
    key = int(KEYS[0]) % 2**64
    for pair in range(3):
        word = (key + (pair + 1) * 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        word ^= word >> 31
        radius = math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32))
        angle = 2 * math.pi * (word % 2**32) / 2**32
        found = normals(KEYS[:1], 2 * pair, 2 * pair + 2)[0].tolist()
        assert found == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], abs=3e-6)
    # Changed keys make every older checkpoint resume as another run.
    expected = np.stack([generator(3, "simplex", 5, slot).bit_generator.random_raw(4) for slot in (0, 2)]).view(np.int64)
    np.testing.assert_array_equal(noise.simplex_keys(3, 5, np.array([0, 2]), 4), expected)


def test_schedule_is_the_cosine_of_the_paper() -> None:
    times = np.linspace(0, 1, 101)
    found, s = remaining_signal(times), 1e-4
    expected = np.cos((times + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found[0] == 1.0 and found[-1] == 0.0 and (np.diff(found) < 0).all()
    levels = SimplexNoise.at(np.zeros((1, 101), np.int64), times[None])
    torch.testing.assert_close(levels.signal.square() + levels.spread.square(), torch.ones(1, 101))
    assert float(levels.spread[0, 0]) == 0.0 and float(levels.signal[0, -1]) == 0.0
    assert conditioning_times(np.array([0.0, 0.25, 1.0])).tolist() == [0.0, 250.0, 1000.0]


def test_masses_are_those_of_the_noised_logits() -> None:
    """exp(x_t) by the definition, up to a factor per position, whole and in parts; an id that is no word lifts nothing."""
    times = np.array([[0.0, 0.2, 0.5, 0.9, 1.0, 0.5]])
    keys = KEYS[:6]
    made = SimplexNoise.at(keys.numpy()[None], times)
    tokens = torch.tensor([2, 0, 10, 7, 3, MASK])
    x0 = torch.full((6, MASK), -K)
    x0[torch.arange(5), tokens[:5]] = K
    signal, spread = made.signal[0, :, None], made.spread[0, :, None]
    expected = (signal * x0 + spread * K * normals(keys, 0, MASK)).softmax(-1)
    found = masses(tokens, *made.flat(), 0, MASK)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected)
    for first, last in ((0, 5), (5, 6), (6, MASK)):
        torch.testing.assert_close(masses(tokens, *made.flat(), first, last), found[:, first:last])


# -- The rows ----------------------------------------------------------------------------------------------------------


def test_rows_say_everything_of_every_position() -> None:
    objective = SimplexDiffusion(MASK, LENGTH, SIZE, (0.3, 0.8), pad_to=8)
    data, slots = rows(6), np.arange(6)
    inputs = objective.training_inputs(data, slots, 2, 0, 6)
    assert torch.equal(inputs.tokens, torch.from_numpy(np.concatenate([data, data[:, :-SIZE]], 1)))
    real = inputs.weights > 0
    assert int(real.sum()) == 6 * (LENGTH - 1) and len(inputs.selected) % 8 == 0 and set(inputs.weights[real].tolist()) == {1.0}
    np.testing.assert_array_equal(inputs.targets[real], data[:, 1:].ravel())
    assert (inputs.selected[real] % LENGTH != 0).all()
    # The times are those of block diffusion: strata and all.
    times = noise.block_times(0, 2, slots, 6, LENGTH // SIZE, (0.3, 0.8))
    assert inputs.noise_levels is not None and inputs.simplex is not None
    np.testing.assert_allclose(inputs.noise_levels, 1000 * times, rtol=1e-6)
    signal = np.sqrt(remaining_signal(np.repeat(times, SIZE, 1)))
    signal[:, 0] = 1.0
    np.testing.assert_allclose(inputs.simplex.signal, signal, rtol=1e-6)
    assert (inputs.simplex.spread[:, 0] == 0).all(), "token 0 is never noised"
    assert inputs.simplex.keys.unique().numel() == 6 * LENGTH
    assert inputs.pattern == BlockDiffusion(MASK, LENGTH, SIZE).pattern and inputs.uses_cross_entropy
    moved = inputs.to("meta")
    assert moved.simplex is not None and moved.simplex.keys.is_meta and moved.simplex.spread.is_meta


def test_noise_of_a_slot_depends_on_no_other() -> None:
    objective, data = SimplexDiffusion(MASK, LENGTH, SIZE), rows(6)
    whole = objective.training_inputs(data, np.arange(6), 2, 0, 6)
    some = np.array([4, 1])
    part = objective.training_inputs(data[some], some, 2, 0, 6)
    held_out, again = (objective.validation_inputs(data[places], places + 7, 0) for places in (np.arange(6), some))
    for one, other in ((whole, part), (held_out, again)):
        assert one.simplex is not None and other.simplex is not None and one.noise_levels is not None and other.noise_levels is not None
        for name in ("keys", "signal", "spread"):
            assert torch.equal(getattr(one.simplex, name)[some], getattr(other.simplex, name))
        assert torch.equal(one.noise_levels[some], other.noise_levels)
    assert whole.simplex is not None and held_out.simplex is not None
    for other in (objective.training_inputs(data, np.arange(6), 3, 0, 6), objective.training_inputs(data, np.arange(6), 2, 1, 6), held_out):
        assert other.simplex is not None and not (other.simplex.keys == whole.simplex.keys).any()


def test_losses_are_means_over_all_data_tokens() -> None:
    objective, data = SimplexDiffusion(MASK, LENGTH, SIZE), rows(4)
    inputs = objective.validation_inputs(data, np.arange(4), 0)
    nll = torch.rand(len(inputs.selected), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(row_nelbo(inputs, nll), nll.view(4, -1).double().mean(1), rtol=1e-6)
    samples = objective.block_samples(inputs, nll, np.arange(4), 0)
    np.testing.assert_array_equal(samples.losses, block_losses(inputs, nll))
    assert (samples.masked == samples.maskable).all() and samples.maskable.tolist() == [[2, 3, 3, 3]] * 4
    np.testing.assert_array_equal(samples.times, noise.validation_times(0, np.arange(4), 4))
    assert not objective.traits.has_likelihood_bound and objective.scored_tokens_per_row == LENGTH - 1


def test_ids_that_are_no_words_are_refused() -> None:
    with pytest.raises(DataError, match="MASK"):
        SimplexDiffusion(MASK, LENGTH, SIZE).training_inputs(np.full((1, LENGTH), MASK), np.arange(1), 0, 0, 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_size": 25}, "block_size is 25 but must divide model.context = 128, because a row is cut into equal blocks; set it to 32"),
        ({"noise_schedule": "square"}, "means nothing to objective.kind=ssdlm"),
        ({"resample": True}, "means nothing to objective.kind=ssdlm"),
        ({"interval": (0.9, 0.1)}, "set 0 <= beta <= omega"),
        ({"clean_half": "none"}, "set block_causal or causal"),
    ],
)
def test_what_cannot_work_is_named(changes: dict, says: str) -> None:
    config = ObjectiveConfig(kind="ssdlm", block_size=16)
    assert isinstance(ObjectiveSchedule(config, 128, MASK).at(0), SimplexDiffusion)
    with pytest.raises(RecipeError) as refused:
        ObjectiveSchedule(replace(config, **changes), 128, MASK)
    assert says in str(refused.value)


def test_there_is_nothing_to_tune() -> None:
    with pytest.raises(RecipeError, match=r"ssdlm has no likelihood bound.*set tuner\.enabled=false"):
        check_tuner(TunerConfig(enabled=True), ObjectiveConfig(kind="ssdlm"))
    check_tuner(TunerConfig(), ObjectiveConfig(kind="ssdlm"))
