"""SEDD: its bound by enumeration of all masks in the terms of the paper, what its network is told, its parts in closed form."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.network_inputs import NetworkInputs, row_nelbo
from bd3_scale.objectives.noise import SCHEDULES, schedule_named
from bd3_scale.objectives.sedd import noise_levels, reveal_factor, total_scores
from bd3_scale.objectives.table import MaskedDiffusion, ScoreEntropy
from bd3_scale.recipe.schema import ModelConfig

WORDS, LENGTH = 3, 5
MASK = WORDS


def network(**variant: object) -> Transformer:
    """Told the noise; weights large enough for it to matter."""
    config = ModelConfig(context=LENGTH, layers=2, hidden=16, heads=2, conditioning="adaln", conditioning_size=8, **variant)  # type: ignore[arg-type]
    made = Transformer(config, WORDS + 1, MASK)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.35, generator=generator)
    return made.eval()


@torch.no_grad()
def logits(model: Transformer, tokens: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """int64 [k, L], mask probabilities [k] -> float64 [k, L, words]."""
    answer = model.decode(torch.from_numpy(tokens), torch.arange(LENGTH), None, None, last=LENGTH, noise_levels=noise_levels(probabilities))
    return answer[..., :WORDS].double().numpy()


def denoising_score_entropy(z: np.ndarray, row: np.ndarray, masked: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Lou et al. 2024, eq. 5 with log-linear noise: sum over y != x_t of Q(x_t, y) (s_y - ratio log s_y + K(ratio)), float64 [k].

    The reverse rate Q from MASK to any word is sigma'(t) = 1 / (1 - t); from a word there is none. ratio = p(y | x0) / p(MASK | x0).
    """
    alpha = (1 - t)[:, None, None]
    scores = alpha / (1 - alpha) * np.exp(z) / WORDS
    ratio = np.eye(WORDS)[row][None] * alpha / (1 - alpha)
    safe = np.where(ratio > 0, ratio, 1.0)
    inner = scores - ratio * np.log(scores) + np.where(ratio > 0, ratio * (np.log(safe) - 1), 0.0)
    return (np.where(masked, inner.sum(-1), 0.0) / alpha[..., 0]).sum(1)


def exact_bound(model: Transformer, row: np.ndarray, bounds: tuple[float, float]) -> float:
    """The integral over t in `bounds` by Gauss-Legendre, of the sum over all masks of tokens 1 to L - 1, in nats per data token."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    low, high = bounds
    times, weights = low + (high - low) * (nodes + 1) / 2, weights * (high - low) / 2
    masks = np.array([(False, *mask) for mask in itertools.product([False, True], repeat=LENGTH - 1)])
    t, masked = np.repeat(times, len(masks)), np.tile(masks, (len(times), 1))
    count = masked.sum(1)
    probability = t**count * (1 - t) ** (LENGTH - 1 - count)
    z = logits(model, np.where(masked, MASK, row), t)
    return float((np.repeat(weights, len(masks)) * probability * denoising_score_entropy(z, row, masked, t)).sum() / (LENGTH - 1))


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(("schedule", "interval"), [("linear", (0.3, 0.8)), ("cosine", (1e-3, 1.0))])
def test_monte_carlo_meets_the_enumerated_bound(schedule: str, interval: tuple[float, float]) -> None:
    """Training on its interval and schedule, validation at U[1e-3, 1]; a network whose answers change with the noise."""
    model, objective, count = network(), ScoreEntropy(MASK, LENGTH, interval, schedule), 20000
    row, indices = np.array([1, 0, 2, 2, 1]), np.arange(count)
    assert np.abs(np.diff(logits(model, np.full((2, LENGTH), MASK), np.array([0.1, 0.9])), axis=0)).max() > 0.1, "the noise says nothing"
    rows = np.tile(row, (count, 1))
    # The bound over an interval of the schedule's times is that over the mask probabilities at its ends.
    ends = schedule_named(schedule).mask_probability(np.array(interval))
    for inputs, bounds, width in (
        (objective.training_inputs(rows, indices, 0, 0, count), (float(ends[0]), float(ends[1])), interval[1] - interval[0]),
        (objective.validation_inputs(rows, indices, 0), (1e-3, 1.0), 1 - 1e-3),
    ):
        with torch.no_grad():
            values = row_nelbo(inputs, model(inputs)[1])
        exact, error = exact_bound(model, row, bounds) / width, values.std(ddof=1) / np.sqrt(count)
        assert abs(values.mean() - exact) < 4 * error and error / exact < 0.02


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_are_those_of_masked_diffusion_and_the_noise_is_told(schedule: str) -> None:
    rows, slots = np.random.default_rng(0).integers(0, WORDS, (6, LENGTH)), np.arange(6)
    ours, theirs = (kind(MASK, LENGTH, (0.2, 0.9), schedule, pad_to=4) for kind in (ScoreEntropy, MaskedDiffusion))
    drawn: list[NetworkInputs] = []
    for mine, twin, name in (
        (ours.training_inputs(rows, slots, 3, 1, 6), theirs.training_inputs(rows, slots, 3, 1, 6), schedule),
        (ours.validation_inputs(rows, slots, 1), theirs.validation_inputs(rows, slots, 1), "linear"),
    ):
        for field in ("tokens", "positions", "selected", "targets", "weights", "dropout_keys"):
            assert torch.equal(getattr(mine, field), getattr(twin, field)), field
        assert mine.pattern == twin.pattern and twin.noise_levels is None and twin.uses_cross_entropy and not mine.uses_cross_entropy
        assert mine.noise_levels is not None and mine.noise_levels.dtype == torch.float32 and mine.noise_levels.shape == (6,)
        # The weight of a row's masked tokens says its t again.
        grid = np.linspace(1e-3, 1, 100001)
        of_grid = schedule_named(name).weight(grid)
        for row in range(6):
            weight = mine.weights[(mine.selected // LENGTH == row) & (mine.weights > 0)]
            if len(weight):
                t = grid[np.abs(of_grid - float(weight[0])).argmin()]
                sigma = -np.log(1 - 0.999 * schedule_named(name).mask_probability(np.array(t)))
                assert float(mine.noise_levels[row]) == pytest.approx(float(sigma), rel=1e-2)
        drawn.append(mine)
    moved = drawn[0].to("cpu")
    assert moved.noise_levels is not None and not moved.uses_cross_entropy
    assert noise_levels(np.array([0.0, 1.0])).tolist() == pytest.approx([0.0, -np.log(1e-3)])


@pytest.mark.usefixtures("world_of_one")
def test_each_row_is_told_its_own_noise() -> None:
    """In a batch as alone, in training as in decoding, in gradients too; a network without conditioning refuses to be told."""
    model, objective = network(), ScoreEntropy(MASK, LENGTH, (0.5, 1.0))
    rows, slots = np.random.default_rng(1).integers(0, WORDS, (4, LENGTH)), np.arange(4)
    inputs = objective.training_inputs(rows, slots, 0, 0, 4)
    assert inputs.noise_levels is not None
    together, nll = model(inputs)
    together.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(model.parameters())) and all(gradient.any() for gradient in gradients)
    model.zero_grad()
    every = torch.arange(LENGTH)
    for row in range(4):
        mine = inputs.selected // LENGTH == row
        alone = replace(
            inputs,
            tokens=inputs.tokens[row : row + 1],
            selected=inputs.selected[mine] - row * LENGTH,
            targets=inputs.targets[mine],
            weights=inputs.weights[mine],
            dropout_keys=inputs.dropout_keys[row : row + 1],
            noise_levels=inputs.noise_levels[row : row + 1],
        )
        total, own = model(alone)
        total.backward()
        torch.testing.assert_close(own, nll[mine], rtol=0, atol=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None and (parameter.grad - gradient).abs().max() < 1e-5 * gradient.abs().max().clamp(min=1)
    decoded = model.decode(inputs.tokens, every, None, None, last=LENGTH, noise_levels=inputs.noise_levels)
    z = decoded.flatten(0, 1)[inputs.selected, :WORDS]
    entropy = z.exp().mean(1) - 1 - z.gather(1, inputs.targets[:, None])[:, 0] + np.log(WORDS)
    torch.testing.assert_close(nll, entropy, rtol=1e-5, atol=1e-5)
    plain = Transformer(ModelConfig(context=LENGTH, layers=1, hidden=16, heads=2), WORDS + 1, MASK)
    with pytest.raises(ValueError, match="without conditioning"):
        plain(inputs)


def test_exact_scores_have_no_price() -> None:
    """softmax(z) with a mean of exp(z) of 1 has A = 1; adding c to all logits multiplies A by exp(c)."""
    z = torch.log_softmax(torch.randn(7, WORDS, dtype=torch.float64), -1) + np.log(WORDS)
    with_mask = torch.cat([z, torch.full((7, 1), -torch.inf)], 1)
    torch.testing.assert_close(total_scores(with_mask), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(total_scores(with_mask + 0.7), torch.full((7,), np.exp(0.7), dtype=torch.float64))


@pytest.mark.parametrize("name", SCHEDULES)
def test_factors_of_the_two_samplers(name: str) -> None:
    """One number for linear alpha; for any other they meet as the step shrinks; the analytic one is a probability."""
    schedule = schedule_named(name)
    for t, s in ((1.0, 0.5), (0.5, 0.25), (0.3, 0.0), (0.8, 0.799)):
        analytic, euler = (reveal_factor(sampler, schedule, t, s) for sampler in ("analytic", "euler"))
        assert 0 < analytic <= 1
        if name == "linear":
            assert analytic == pytest.approx((t - s) / t) == pytest.approx(euler)
        if t - s < 0.01:
            assert analytic == pytest.approx(euler, rel=0.01)
    assert reveal_factor("analytic", schedule, 0.3, 0.0) == 1
    times: Tensor = noise_levels(schedule.mask_probability(np.linspace(0, 1, 9)))
    assert (times.diff() > 0).all()
