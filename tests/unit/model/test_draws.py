"""A network that sees several draws of a row beside one clean half answers as for each of them alone: loss, nll and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.objectives.table import BlockDiffusion, NetworkInputs, SimplexDiffusion
from tests.unit.model.test_transformer import LENGTH, MASK, gradients, network

pytestmark = pytest.mark.usefixtures("world_of_one")

INTERVAL, SAMPLES = (0.3, 0.9), 3
OBJECTIVES: dict[str, tuple[str, Any]] = {
    "2 draws": ("gpt", BlockDiffusion(MASK, LENGTH, 4, INTERVAL, draws=2)),
    "complements": ("llama", BlockDiffusion(MASK, LENGTH, 4, INTERVAL, draws=4, pairs="complement")),
    "causal clean half": ("gpt", BlockDiffusion(MASK, LENGTH, 4, INTERVAL, clean_half="causal", draws=3)),
    "documents": ("llama", BlockDiffusion(MASK, LENGTH, 4, INTERVAL, document_end=0, draws=2)),
    "L'=L": ("gpt", BlockDiffusion(MASK, LENGTH, LENGTH, INTERVAL, draws=3)),
    "ssdlm": ("adaln", SimplexDiffusion(MASK, LENGTH, 4, INTERVAL, draws=2)),
}


def inputs_of(objective: Any) -> NetworkInputs:
    rows = np.random.default_rng(4).integers(0, MASK, (SAMPLES, LENGTH))
    inputs: NetworkInputs = objective.training_inputs(rows, np.arange(SAMPLES), 0, 0, SAMPLES)
    return inputs


def of_one(inputs: NetworkInputs, draw: int) -> NetworkInputs:
    """The inputs of one of the draws, as an objective of one draw lays them out."""
    pattern, length = inputs.pattern, inputs.pattern.length

    def streams(rows: Tensor) -> Tensor:
        return torch.cat([rows[:, draw * length : (draw + 1) * length], rows[:, pattern.scored_rows :]], 1)

    noisy = inputs.selected // length
    ours = (noisy % pattern.draws == draw) & (inputs.weights > 0)
    simplex, levels = inputs.simplex, inputs.noise_levels
    return replace(
        inputs,
        tokens=streams(inputs.tokens),
        positions=streams(inputs.positions[None])[0],
        selected=(noisy // pattern.draws * length + inputs.selected % length)[ours],
        targets=inputs.targets[ours],
        weights=inputs.weights[ours],
        pattern=replace(pattern, draws=1),
        segments=None if inputs.segments is None else streams(inputs.segments),
        noise_levels=None if levels is None else levels.unflatten(1, (pattern.draws, -1))[:, draw],
        simplex=None if simplex is None else simplex.moved(lambda part: part.unflatten(1, (pattern.draws, -1))[:, draw]),
    )


def results(model: Any, inputs: NetworkInputs) -> dict[str, Tensor]:
    model.zero_grad()
    total, nll = model(inputs)
    total.backward()
    return {"loss": total.detach(), "nll": nll, **gradients(model)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_draws_together_are_the_sum_of_the_draws_alone(name: str) -> None:
    variant, objective = OBJECTIVES[name]
    model, inputs = network(variant), inputs_of(objective)
    found = results(model, inputs)
    alone = [results(model, of_one(inputs, draw)) for draw in range(inputs.pattern.draws)]
    for key, value in found.items():
        if key == "nll":
            noisy = inputs.selected // LENGTH % inputs.pattern.draws
            for draw, each in enumerate(alone):
                torch.testing.assert_close(value[noisy == draw], each[key], rtol=2e-6, atol=2e-6)
            continue
        expected = torch.stack([each[key] for each in alone]).double().sum(0)
        assert float((value - expected).abs().max()) < 2e-6 * max(1.0, float(expected.abs().max())), key


def test_draws_with_the_same_noise_are_that_draw() -> None:
    model, single = network("llama"), inputs_of(BlockDiffusion(MASK, LENGTH, 4, INTERVAL))
    streams = [single.tokens[:, :LENGTH]] * 3 + [single.tokens[:, LENGTH:]]
    samples, rows = single.selected // LENGTH, single.selected % LENGTH
    places, order = torch.cat([(3 * samples + draw) * LENGTH + rows for draw in range(3)]).sort()
    thrice = replace(
        single,
        tokens=torch.cat(streams, 1),
        positions=torch.cat([single.positions[:LENGTH]] * 3 + [single.positions[LENGTH:]]),
        selected=places,
        targets=single.targets.repeat(3)[order],
        weights=single.weights.repeat(3)[order],
        pattern=replace(single.pattern, draws=3),
    )
    found, expected = results(model, thrice), results(model, single)
    for key in found.keys() - {"nll"}:
        assert float((found[key] / 3 - expected[key]).abs().max()) < 2e-6 * max(1.0, float(expected[key].abs().max())), key
