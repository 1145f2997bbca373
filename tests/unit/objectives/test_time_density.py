"""Densities of t: whatever the density, the expected train loss is the bound; draws are functions of (seed, step, slot) in strata."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from bd3_scale.costs.pipeline_stages import expected_masked
from bd3_scale.objectives import noise
from bd3_scale.objectives.network_inputs import block_losses
from bd3_scale.objectives.noise import SCHEDULES
from bd3_scale.objectives.sedd import ScoreEntropy
from bd3_scale.objectives.table import BlockDiffusion, MaskedDiffusion
from bd3_scale.objectives.time_density import UNIFORM_SHARE, TimeDensity, time_density
from bd3_scale.rules.objective import Interval
from tests.unit.objectives.exact_bound import exact_block_nelbo

MASK = 3
WHOLE = (1e-3, 1.0)
DENSITIES: dict[str, dict] = {
    "uniform": {},
    "beta": {"density": "beta", "density_shape": [3, 1.5]},
    "pareto": {"density": "pareto", "density_shape": [0.7]},
    "learned": {"learned": (5, 0, 1, 30, 2)},
}


@pytest.mark.parametrize(
    ("density", "interval", "schedule", "size"),
    [
        *((density, WHOLE, "linear", 4) for density in DENSITIES),
        *((density, (0.3, 0.8), "linear", 3) for density in DENSITIES),
        ("learned", WHOLE, "linear", 1),
        ("beta", (0.2, 1.0), "cosine", 3),
    ],
)
def test_the_expected_loss_is_the_exact_bound(density: str, interval: Interval, schedule: str, size: int) -> None:
    """To 1e-6, by quadrature over the position in [0, 1) that t is drawn from, and by enumeration of the masks at each t."""
    objective = BlockDiffusion(MASK, 2 * size, size, interval, noise_schedule=schedule, **DENSITIES[density])
    row = np.random.default_rng(0).integers(0, MASK, 2 * size)
    table = np.log(np.random.default_rng(1).dirichlet(np.full(MASK, 0.7), size=((MASK + 1) ** size, size)))
    masks = (np.arange(2**size)[:, None] >> np.arange(size)) & 1 == 1
    nodes, shares = np.polynomial.legendre.leggauss(24)
    ends = np.concatenate([[0.0], np.cumsum(objective.times.probabilities)])
    expected = 0.0
    for start, end in pairwise(ends):
        positions = start + (end - start) * (nodes + 1) / 2
        times, corrections = objective.times.draw(positions)
        of_masks = np.repeat(masks[None], len(times), axis=0).reshape(-1, size)
        rows = np.tile(row, (len(of_masks), 1))
        noisy = np.concatenate([np.zeros_like(of_masks), of_masks], axis=1)  # the second block; the first has a token that is not scored
        of_rows = [np.repeat(values, len(masks))[:, None].repeat(2, axis=1) for values in (times, corrections)]
        keys = np.zeros(len(rows), np.int64)
        inputs = objective._inputs(rows, noisy, of_rows[0], SCHEDULES[schedule], keys, objective.pattern, of_rows[1])
        tokens = inputs.tokens[:, size : 2 * size].numpy()
        log_p = table[tokens @ (MASK + 1) ** np.arange(size)][:, np.arange(size), row[size:]]
        nll = torch.from_numpy(-log_p[of_masks])
        probability = SCHEDULES[schedule].mask_probability(times)[:, None, None]
        of_mask = np.where(masks, probability, 1 - probability).prod(-1)
        losses = block_losses(inputs, nll)[:, 1].reshape(len(times), -1)
        expected += float(((of_mask * losses).sum(1) * shares).sum() * (end - start) / 2)
    bounds = tuple(SCHEDULES[schedule].mask_probability(np.array(interval)))
    exact = exact_block_nelbo(lambda noised: table[noised @ (MASK + 1) ** np.arange(size)], row[size:], MASK, bounds)
    assert expected == pytest.approx(exact / size / (interval[1] - interval[0]), rel=1e-6)


@pytest.mark.parametrize("density", DENSITIES)
def test_draws_are_functions_of_seed_step_and_slot_in_strata(density: str) -> None:
    batch, blocks = 12, 8
    objective = BlockDiffusion(MASK, 4 * blocks, 4, (0.05, 0.9), **DENSITIES[density])
    rows = np.zeros((batch, 4 * blocks), np.int64)
    whole = objective.training_inputs(rows, np.arange(batch), 3, 7, batch)
    parts = [
        objective.training_inputs(rows[: len(slots)], slots, 3, 7, batch)
        for slots in (np.array([9, 2]), np.delete(np.arange(batch), [2, 9]))
    ]
    np.testing.assert_array_equal(
        np.concatenate([part.tokens for part in parts]), whole.tokens[[9, 2, *np.delete(np.arange(batch), [2, 9])]]
    )
    # Every stratum of the batch once: t ascends with the position that it is drawn from.
    positions = noise.block_times(7, 3, np.arange(batch), batch, blocks, (0.0, 1.0))
    times, corrections = objective.times.draw(positions)
    order = np.argsort(positions.ravel())
    assert (np.diff(times.ravel()[order]) > 0).all() and times.min() >= 0.05 and times.max() <= 0.9
    of_density = np.interp(times.ravel()[order], objective.times.edges, np.concatenate([[0], np.cumsum(objective.times.probabilities)]))
    np.testing.assert_array_equal(
        np.floor(of_density * batch * blocks - 1e-9 * (density == "uniform")).astype(int), np.arange(batch * blocks)
    )
    # What the network is given: the mask of these t, and their weights.
    masked = noise.masked_tokens(7, 3, np.arange(batch), times, 4)
    np.testing.assert_array_equal((whole.tokens[:, : 4 * blocks] == MASK).numpy(), masked)
    expected = np.repeat(corrections / times, 4, axis=1)[masked]
    np.testing.assert_array_equal(whole.weights, expected.astype(np.float32))
    assert corrections.max() <= 1 / UNIFORM_SHARE + 1e-9


def test_shapes() -> None:
    """A bell in the middle of the interval, masses of t^-(1 + alpha), and what is uniform is exactly what there was before."""
    bell = time_density((0.2, 0.6), "beta", ())
    np.testing.assert_allclose(bell.draw(np.array([0.5]))[0], 0.4, atol=1e-5)
    places = (bell.edges - 0.2) / 0.4
    mixed = (1 - UNIFORM_SHARE) * np.diff(3 * places**2 - 2 * places**3) + UNIFORM_SHARE * np.diff(places)
    np.testing.assert_allclose(bell.probabilities, mixed, rtol=1e-12)
    root = time_density(WHOLE, "pareto", ())
    assert np.ptp(np.array(root.shape)) < 1e-12, "bins are equally wide in sqrt(t)"
    np.testing.assert_allclose(time_density(WHOLE, "pareto", (0.0,)).shape, np.diff(np.log(root.edges)), rtol=1e-12)
    positions = noise.block_times(0, 3, np.arange(4), 4, 8, (0.0, 1.0))
    times, corrections = TimeDensity((0.3, 0.8)).draw(positions)
    np.testing.assert_array_equal(times, noise.block_times(0, 3, np.arange(4), 4, 8, (0.3, 0.8)))
    assert (corrections == 1).all()
    for name, learned in (("beta", ()), ("uniform", (1, 2))):  # a point has one density
        assert time_density((1.0, 1.0), name, (), learned) == TimeDensity((1.0, 1.0))
    assert expected_masked("linear", TimeDensity(WHOLE, (1, 0))) < 0.5 < expected_masked("linear", TimeDensity(WHOLE, (0, 1)))


@pytest.mark.parametrize("kind", [MaskedDiffusion, ScoreEntropy])
def test_rows_of_one_block_are_corrected_alike(kind: type[MaskedDiffusion]) -> None:
    rows, slots = np.zeros((6, 16), np.int64), np.arange(6)
    plain, dense = (kind(MASK, 16, learned=learned).training_inputs(rows, slots, 2, 0, 6) for learned in ((), (1, 4, 1)))
    blocks = BlockDiffusion(MASK, 16, 16, learned=(1, 4, 1)).training_inputs(rows, slots, 2, 0, 6)
    assert torch.equal(dense.tokens, blocks.tokens) and torch.equal(dense.weights, blocks.weights)
    assert not torch.equal(dense.weights, plain.weights)
    same = replace(kind(MASK, 16), learned=(1, 4, 1)).validation_inputs(rows, slots, 0)
    assert torch.equal(same.weights, kind(MASK, 16).validation_inputs(rows, slots, 0).weights)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("beta", (1e6, 1e6)), ("beta", (1e6, 1.0)), ("beta", (1e-6, 1e6)), ("pareto", (1000.0,)), ("pareto", (-0.999,))],
)
@pytest.mark.parametrize("interval", [(1e-3, 1.0), (1e-9, 1.0), (0.3, 0.31)])
def test_a_density_of_any_shape_is_one(name: str, shape: tuple[float, ...], interval: tuple[float, float]) -> None:
    times, corrections = time_density(interval, name, shape).draw(np.linspace(0, 1, 1000, endpoint=False))
    assert np.isfinite(times).all() and (times >= interval[0]).all() and (times <= interval[1]).all()
    assert (corrections > 0).all() and corrections.max() <= 10 + 1e-9 and corrections.mean() == pytest.approx(1, abs=0.02)
