"""Objectives as laid out for the network: properties 4 and 5 with a tabular model, invariance to the split, recipes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from bd3_scale.errors import DataError, RecipeError
from bd3_scale.objectives import noise
from bd3_scale.objectives.network_inputs import NetworkInputs, block_losses, counted_tokens, row_nelbo
from bd3_scale.objectives.noise import SCHEDULES
from bd3_scale.objectives.table import Autoregressive, BlockDiffusion, MaskedDiffusion, ObjectiveSchedule
from bd3_scale.recipe.objective_kinds import DEFAULT_BLOCK_SIZE
from bd3_scale.recipe.schema import ObjectiveConfig
from tests.unit.objectives.exact_bound import exact_block_nelbo

VOCABULARY = 3
MASK = VOCABULARY


class TabularModel:
    """A random conditional model of one row: log p(token | noisy block, clean prefix) from a table for each block.

    The prefix is the row itself, so a table per block stands for every dependence on it.
    """

    def __init__(self, blocks: int, block_size: int, seed: int = 0) -> None:
        shape = (blocks, (VOCABULARY + 1) ** block_size, block_size)
        self.table = np.log(np.random.default_rng(seed).dirichlet(np.full(VOCABULARY, 0.7), size=shape))
        self.place = (VOCABULARY + 1) ** np.arange(block_size)

    def log_probabilities(self, block: int, noised: np.ndarray) -> np.ndarray:
        """int64 [k, L'] -> float64 [k, L', V]."""
        return self.table[block, noised @ self.place]

    def nll(self, inputs: NetworkInputs) -> torch.Tensor:
        """What the network would return: -log p of each selected target, float64 [n], from the noisy half alone."""
        length, size = inputs.pattern.length, inputs.pattern.block_size
        noisy = inputs.tokens[:, :length].numpy().reshape(-1, length // size, size)
        log_p = np.stack([self.log_probabilities(b, noisy[:, b]) for b in range(length // size)], axis=1)
        flat = log_p.reshape(-1, VOCABULARY)
        return torch.from_numpy(-flat[inputs.selected.numpy(), inputs.targets.numpy()])

    def exact(self, row: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
        """Exact bound of each block per counted token, with the mask probability restricted to `bounds`: float64 [B]."""
        size = len(self.place)
        values = []
        for b, tokens in enumerate(row.reshape(-1, size)):
            spared = tokens[: 1 if b == 0 else 0]

            def of_rest(noised: np.ndarray, block: int = b, spared: np.ndarray = spared) -> np.ndarray:
                whole = np.concatenate([np.tile(spared, (len(noised), 1)), noised], axis=1)
                return self.log_probabilities(block, whole)[:, len(spared) :]

            rest = tokens[len(spared) :]
            values.append(exact_block_nelbo(of_rest, rest, MASK, bounds) / len(rest) if len(rest) else np.nan)
        return np.array(values)


def _row(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)


@pytest.mark.parametrize(
    ("schedule", "interval", "block_size"),
    [
        *((name, (1e-3, 1.0), 3) for name in SCHEDULES),
        ("linear", (0.3, 0.8), 3),
        ("cosine", (0.3, 0.8), 2),
        ("linear", (1e-3, 1.0), 1),
        ("linear", (1e-3, 1.0), 6),
    ],
)
def test_monte_carlo_loss_is_the_exact_bound(schedule: str, interval: tuple[float, float], block_size: int) -> None:
    """Property 5, and the second half of property 4 at L' = 1: the mean over steps meets the enumeration for every block."""
    steps, global_batch, blocks = 150, 32, 3
    objective = BlockDiffusion(MASK, blocks * block_size, block_size, interval, noise_schedule=schedule)
    model, row = TabularModel(blocks, block_size), _row(blocks * block_size)
    rows, slots = np.tile(row, (global_batch, 1)), np.arange(global_batch)
    # Strata tie the slots of one step together; steps are independent and carry the standard error.
    means = np.empty((steps, blocks))
    for step in range(steps):
        inputs = objective.training_inputs(rows, slots, step, 0, global_batch)
        means[step] = block_losses(inputs, model.nll(inputs)).mean(0)
    bounds = tuple(SCHEDULES[schedule].mask_probability(np.array(interval)))
    exact = model.exact(row, bounds) / (interval[1] - interval[0])
    error = means.std(0, ddof=1) / np.sqrt(steps)
    counted = counted_tokens(objective.pattern) > 0
    assert (np.abs(means.mean(0) - exact) < 4 * error)[counted].all(), (means.mean(0), exact, error)
    assert (error / exact)[counted].max() < 0.1, "too few samples to tell a wrong weight"


def test_validation_meets_the_exact_bound_whatever_training_does() -> None:
    """NELBO: t ~ U[1e-3, 1] and weight 1/t, also when training clips and bends its schedule."""
    objective = BlockDiffusion(MASK, 9, 3, (0.45, 0.95), noise_schedule="square")
    model, row, count = TabularModel(3, 3), _row(9), 6000
    inputs = objective.validation_inputs(np.tile(row, (count, 1)), np.arange(count), 0)
    values = row_nelbo(inputs, model.nll(inputs))
    exact = (model.exact(row, (1e-3, 1.0)) / (1 - 1e-3) * counted_tokens(objective.pattern)).sum() / 8
    error = values.std(ddof=1) / np.sqrt(count)
    assert abs(values.mean() - exact) < 4 * error and error / exact < 0.02
    again = replace(objective, interval=(0.1, 0.2), noise_schedule="log").validation_inputs(row[None], np.array([17]), 0)
    np.testing.assert_array_equal(again.tokens[0], inputs.tokens[17])


@pytest.mark.parametrize("kind", ["training", "validation"])
def test_block_size_1_at_full_masking_is_the_autoregressive_likelihood(kind: str) -> None:
    """Property 4: exactly, not in the mean. Every token but token 0 is scored once, with weight 1, given the clean prefix."""
    length, rows = 12, np.stack([_row(12, seed) for seed in range(4)])
    objective = BlockDiffusion(MASK, length, 1, (1.0, 1.0))
    if kind == "training":
        inputs = objective.training_inputs(rows, np.arange(4), 3, 0, 4)
    else:
        inputs = replace(objective, interval=(1e-3, 1.0)).validation_inputs(rows, np.arange(4), 0)
    model = TabularModel(length, 1)
    log_p = np.stack([model.log_probabilities(i, np.array([[MASK]]))[0, 0] for i in range(length)])
    likelihood = np.array([-sum(log_p[i, row[i]] for i in range(1, length)) for row in rows])
    np.testing.assert_allclose(row_nelbo(inputs, model.nll(inputs)) * (length - 1), likelihood, rtol=1e-14)
    assert inputs.weights.tolist() == [1.0] * (4 * (length - 1))
    assert np.isnan(block_losses(inputs, model.nll(inputs))[:, 0]).all()


@pytest.mark.parametrize(("block_size", "schedule"), [(1, "linear"), (4, "linear"), (16, "cosine")])
def test_layout_of_the_inputs(block_size: int, schedule: str) -> None:
    rows = np.stack([_row(16, seed) for seed in range(5)])
    slots = np.array([7, 0, 3, 2, 5])
    objective = BlockDiffusion(MASK, 16, block_size, (0.2, 0.9), noise_schedule=schedule)
    inputs = objective.training_inputs(rows, slots, 4, 1, 8)
    noisy, clean = inputs.tokens.numpy()[:, :16], inputs.tokens.numpy()[:, 16:]
    np.testing.assert_array_equal(clean, rows[:, : 16 - block_size])  # nobody sees the last block's
    masked = noisy == MASK
    np.testing.assert_array_equal(noisy[~masked], rows[~masked])
    assert not masked[:, 0].any()
    np.testing.assert_array_equal(inputs.positions, [*range(16), *range(16 - block_size)])
    np.testing.assert_array_equal(inputs.selected, np.flatnonzero(masked))
    np.testing.assert_array_equal(inputs.targets, rows[masked])
    times = noise.block_times(1, 4, slots, 8, 16 // block_size, (0.2, 0.9))
    weights = SCHEDULES[schedule].weight(np.repeat(times, block_size, axis=1))[masked]
    np.testing.assert_array_equal(inputs.weights, weights.astype(np.float32))
    np.testing.assert_array_equal(inputs.dropout_keys, noise.dropout_keys(1, 4, slots))
    assert [inputs.selected.dtype, inputs.targets.dtype, inputs.tokens.dtype, inputs.dropout_keys.dtype] == [torch.int64] * 4
    assert inputs.pattern == objective.pattern and inputs.tokens.shape[1] == inputs.pattern.rows
    moved = inputs.to("meta", non_blocking=True)
    assert moved.tokens.device.type == "meta" and moved.pattern == inputs.pattern


@pytest.mark.parametrize(
    "parts", [[range(0, 12)], [range(i, i + 1) for i in range(12)], [range(i, 12, 4) for i in range(4)], [range(6, 12), range(0, 6)]]
)
def test_micro_batches_and_replicas_are_parts_of_one_batch(parts: list[range]) -> None:
    """Properties 6 and 7 as far as inputs go: any division of the global batch has the same rows, noise and loss sum."""
    rows = np.stack([_row(8, seed) for seed in range(12)])
    objective = BlockDiffusion(MASK, 8, 2, (0.3, 0.8))
    whole = objective.training_inputs(rows, np.arange(12), 9, 2, 12)
    model = TabularModel(4, 2)
    losses, loss_sum = block_losses(whole, model.nll(whole)), 0.0
    for part in parts:
        slots = np.array(part)
        inputs = objective.training_inputs(rows[slots], slots, 9, 2, 12)
        np.testing.assert_array_equal(inputs.tokens, whole.tokens[slots])
        np.testing.assert_array_equal(inputs.dropout_keys, whole.dropout_keys[slots])
        np.testing.assert_array_equal(block_losses(inputs, model.nll(inputs)), losses[slots])
        loss_sum += float((inputs.weights.double() * model.nll(inputs)).sum())
    assert loss_sum == pytest.approx(float((whole.weights.double() * model.nll(whole)).sum()), rel=1e-13)


@pytest.mark.parametrize("pad_to", [7, 64])
def test_padding_adds_exactly_nothing(pad_to: int) -> None:
    rows = np.stack([_row(8, seed) for seed in range(3)])
    plain = BlockDiffusion(MASK, 8, 4)
    plain_inputs = plain.training_inputs(rows, np.arange(3), 0, 0, 3)
    padded = replace(plain, pad_to=pad_to).training_inputs(rows, np.arange(3), 0, 0, 3)
    count = len(plain_inputs.selected)
    assert len(padded.selected) % pad_to == 0 and 0 <= len(padded.selected) - count < pad_to
    for name in ("selected", "targets", "weights"):
        value = getattr(padded, name)
        assert torch.equal(value[:count], getattr(plain_inputs, name)) and not value[count:].any()
    nll = torch.rand(count, generator=torch.Generator().manual_seed(0))
    beyond = torch.cat([nll, torch.full((len(padded.selected) - count,), torch.inf)])
    np.testing.assert_array_equal(block_losses(padded, beyond), block_losses(plain_inputs, nll))
    # Nothing masked at all: still one entry, of weight 0.
    nothing = replace(plain, interval=(1e-12, 1e-12), pad_to=pad_to).training_inputs(rows, np.arange(3), 0, 0, 3)
    assert len(nothing.selected) == pad_to and not nothing.weights.any() and not (nothing.tokens == MASK).any()
    assert not row_nelbo(nothing, torch.rand(pad_to)).any()


def test_losses_divide_by_data_tokens() -> None:
    """Never by masked tokens, and token 0 is no data token."""
    objective = BlockDiffusion(MASK, 12, 4, (0.25, 0.25))
    inputs = objective.training_inputs(_row(12)[None], np.array([0]), 0, 0, 1)
    nll = torch.rand(len(inputs.selected), dtype=torch.float64)
    losses = block_losses(inputs, nll)
    by_hand = np.zeros(3)
    for where, value in zip(inputs.selected.tolist(), nll.tolist(), strict=True):
        by_hand[where // 4] += value * 4.0
    np.testing.assert_allclose(losses[0], by_hand / [3, 4, 4])
    assert row_nelbo(inputs, nll)[0] == pytest.approx(by_hand.sum() / 11)
    assert objective.scored_tokens_per_row == 11 == counted_tokens(objective.pattern).sum()


def test_a_schedule_refuses_what_cannot_work() -> None:
    built = ObjectiveSchedule(ObjectiveConfig(block_size=4, interval=(0.3, 0.8), noise_schedule="log"), 16, 5, pad_to=8).at(0)
    assert built == BlockDiffusion(5, 16, 4, (0.3, 0.8), "block_causal", "log", 8)
    for config, message in (
        (ObjectiveConfig(kind="gpt"), "objective.kind is 'gpt'"),
        (ObjectiveConfig(block_size=5), "objective.block_size is 5 .* divide model.context = 16.*set it to 4"),
        (ObjectiveConfig(block_size=0), "objective.block_size is 0"),
        (ObjectiveConfig(interval=(0.8, 0.3)), "objective.interval"),
        (ObjectiveConfig(noise_schedule="bent"), "objective.noise_schedule is 'bent'"),
        (ObjectiveConfig(clean_half="full"), "objective.clean_half is 'full'"),
    ):
        with pytest.raises(RecipeError, match=message):
            ObjectiveSchedule(config, 16, 5)


def test_masked_diffusion_is_one_block_without_the_clean_stream() -> None:
    """Same noise, weights, targets, losses and rows of the network as block diffusion with L' = L."""
    rows, slots = np.stack([_row(8, seed) for seed in range(5)]), np.array([3, 0, 4, 1, 2])
    for settings in ({}, {"interval": (0.3, 0.8), "noise_schedule": "cosine", "pad_to": 16}, {"interval": (0.3, 0.8), "resample": True}):
        alone = MaskedDiffusion(MASK, 8, **settings)  # type: ignore[arg-type]
        twin = BlockDiffusion(MASK, 8, 8, **settings)  # type: ignore[arg-type]
        for inputs, reference in (
            (alone.training_inputs(rows, slots, 2, 1, 5), twin.training_inputs(rows, slots, 2, 1, 5)),
            (alone.validation_inputs(rows, slots, 1), twin.validation_inputs(rows, slots, 1)),
        ):
            assert inputs.pattern.kind == "full" and inputs.tokens.shape == (5, 8)
            assert inputs.pattern == reference.pattern
            for name in ("tokens", "positions", "selected", "targets", "weights", "dropout_keys"):
                assert torch.equal(getattr(inputs, name), getattr(reference, name)), name
            nll = torch.rand(len(inputs.selected))
            np.testing.assert_array_equal(block_losses(inputs, nll), block_losses(reference, nll))
            np.testing.assert_array_equal(row_nelbo(inputs, nll), row_nelbo(reference, nll))
    assert (alone.kind, alone.block_size, alone.traits.predicts_next_token, alone.scored_tokens_per_row) == ("mdlm", 8, False, 7)


def test_masked_diffusion_meets_the_exact_bound() -> None:
    """Property 5 for L' = L: training at a clip and validation at U[1e-3, 1], by enumeration of all masks of the row."""
    objective, count = MaskedDiffusion(MASK, 5, (0.3, 0.8)), 8000
    model, row, indices = TabularModel(1, 5), _row(5), np.arange(count)
    rows = np.tile(row, (count, 1))
    for inputs, bounds in (
        (objective.training_inputs(rows, indices, 0, 0, count), (0.3, 0.8)),
        (objective.validation_inputs(rows, indices, 0), (1e-3, 1.0)),
    ):
        values = row_nelbo(inputs, model.nll(inputs))
        exact = model.exact(row, bounds)[0] / (bounds[1] - bounds[0])
        error = values.std(ddof=1) / np.sqrt(count)
        assert abs(values.mean() - exact) < 4 * error and error / exact < 0.02


def test_the_next_token_loss_as_laid_out() -> None:
    """Row i predicts token i + 1, every token but token 0 once, with weight 1; no noise but that of dropout."""
    rows, slots = np.stack([_row(6, seed) for seed in range(4)]), np.array([3, 0, 2, 1])
    objective = Autoregressive(MASK, 6, pad_to=7)
    inputs = objective.training_inputs(rows, slots, 9, 1, 4)
    np.testing.assert_array_equal(inputs.tokens, rows)
    assert inputs.pattern.kind == "causal" and inputs.pattern.rows == 6 and inputs.positions.tolist() == list(range(6))
    assert len(inputs.selected) == 21 and inputs.weights.tolist() == [1.0] * 20 + [0.0]
    flat = rows.ravel()
    for where, target in zip(inputs.selected[:20].tolist(), inputs.targets[:20].tolist(), strict=True):
        assert where % 6 < 5 and flat[where + 1] == target
    np.testing.assert_array_equal(inputs.dropout_keys, noise.dropout_keys(1, 9, slots))
    # Losses belong to the predicted token: each is a block of its own, and token 0 is none.
    nll = torch.rand(21, dtype=torch.float64)
    losses = block_losses(inputs, nll)
    assert np.isnan(losses[:, 0]).all()
    np.testing.assert_array_equal(losses[:, 1:], nll[:20].reshape(4, 5))
    np.testing.assert_allclose(row_nelbo(inputs, nll), nll[:20].reshape(4, 5).mean(1), rtol=1e-15)
    fixed = objective.validation_inputs(rows, np.array([8, 1, 5, 7]), 0)
    assert all(torch.equal(getattr(fixed, name), getattr(inputs, name)) for name in ("tokens", "selected", "targets", "weights"))
    next_token = objective.traits.predicts_next_token
    assert (objective.kind, objective.block_size, next_token, objective.scored_tokens_per_row) == ("ar", 1, True, 5)
    with pytest.raises(DataError, match="is MASK"):
        objective.training_inputs(np.full((1, 6), MASK), np.array([0]), 0, 0, 1)
    with pytest.raises(ValueError, match="shape"):
        objective.validation_inputs(rows[:, :5], slots, 0)


def test_block_sizes_over_training() -> None:
    config = ObjectiveConfig(block_size=[[0, 16], [100, 4], [150, 1]], interval=(0.3, 0.8))
    assert ObjectiveSchedule(config, 16, 5).at(0) == BlockDiffusion(5, 16, 16, (0.3, 0.8))
    sizes = [ObjectiveSchedule(config, 16, 5).at(step).block_size for step in (0, 99, 100, 149, 150, 10**6)]
    assert sizes == [16, 16, 4, 4, 1, 1]
    schedule = ObjectiveSchedule(config, 16, 5, pad_to=8)
    tuned = schedule.at(120, (0.45, 0.95))
    assert tuned == BlockDiffusion(5, 16, 4, (0.45, 0.95), pad_to=8)
    assert schedule.at(130, (0.45, 0.95)) is tuned
    assert ObjectiveSchedule(ObjectiveConfig(), 32, 5).at(0).block_size == DEFAULT_BLOCK_SIZE
    assert ObjectiveSchedule(ObjectiveConfig(kind="mdlm"), 32, 5).at(7, (0.3, 0.8)) == MaskedDiffusion(5, 32, (0.3, 0.8))
    assert ObjectiveSchedule(ObjectiveConfig(kind="ar"), 32, 5).at(7, (1e-3, 1.0)) == Autoregressive(5, 32)
    for value, message in (
        ([[1, 16]], "starts at step 1"),
        ([[0, 16], [100, 5]], "block_size is 5 but must divide model.context = 16"),
        ([[0, 16], [100, 8], [100, 4]], "step 100 after step 100"),
        ([[0, 16], [50, 8], [20, 4]], "step 20 after step 50"),
        ([[0, 16], [100]], r"the entry \[100\]; set a whole number or a list"),
        ([[0, 16], [100.5, 8]], r"the entry \[100.5, 8\]"),
        ([0, 16], "the entry 0"),
        ([], r"block_size is \[\]; set a whole number"),
        ("four", "block_size is 'four'; set a whole number"),
        (True, "block_size is True; set a whole number"),
        (4.0, "block_size is 4.0; set a whole number"),
        ([[0, 0]], "block_size is 0"),
    ):
        with pytest.raises(RecipeError, match=message):
            ObjectiveSchedule(ObjectiveConfig(block_size=value), 16, 5)


def test_keys_that_a_kind_does_not_use_are_refused() -> None:
    for kind, settings in (
        ("mdlm", {"block_size": 4, "clean_half": "causal"}),
        ("ar", {"block_size": 1, "clean_half": "causal", "interval": [0.3, 0.8], "noise_schedule": "log", "resample": True}),
    ):
        for key, value in settings.items():
            with pytest.raises(
                RecipeError, match=rf"objective\.{key} is .* means nothing to objective.kind={kind}; remove objective.{key}"
            ):
                ObjectiveSchedule(ObjectiveConfig(**{"kind": kind, key: value}), 16, 5)  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match=r"or set objective\.block_size=null$"):
            ObjectiveSchedule(ObjectiveConfig(kind=kind, block_size=4), 16, 5)
        ObjectiveSchedule(ObjectiveConfig(kind=kind, interval=[1e-3, 1.0]), 16, 5)  # type: ignore[arg-type]  # as YAML gives it


@pytest.mark.parametrize("text", ["block_size=8", "block_size=[[0,16],[100,4]]", "kind=ar", "block_size=null"])
def test_block_sizes_through_yaml_and_the_command_line(text: str) -> None:
    """OmegaConf must carry both forms, and its YAML must read back as the same objective."""
    merged = OmegaConf.merge(OmegaConf.structured(ObjectiveConfig), OmegaConf.from_dotlist([text]))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ObjectiveConfig)
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ObjectiveConfig), OmegaConf.create(OmegaConf.to_yaml(merged))))
    assert again == config
    sizes = [ObjectiveSchedule(config, 16, 5).at(step).block_size for step in (0, 100)]
    assert sizes == {"block_size=8": [8, 8], "kind=ar": [1, 1], "block_size=null": [DEFAULT_BLOCK_SIZE] * 2}.get(text, [16, 4])


def test_data_that_holds_mask_is_refused() -> None:
    objective = BlockDiffusion(MASK, 4, 2)
    for bad in ([0, 1, MASK, 2], [0, ~MASK, 1, 2]):
        with pytest.raises(DataError, match="is MASK"):
            objective.training_inputs(np.array([bad]), np.array([0]), 0, 0, 1)
    with pytest.raises(ValueError, match="shape"):
        objective.validation_inputs(np.zeros((1, 5), np.int64), np.array([0]), 0)
