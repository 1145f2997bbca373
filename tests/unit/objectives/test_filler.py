"""Rows that only fill a micro-batch up add exactly nothing: loss, gradients and nll are those of the batch without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.network_inputs import NetworkInputs, scored_rows
from bd3_scale.objectives.table import Autoregressive, BlockDiffusion, MaskedDiffusion, Objective, ScoreEntropy, SimplexDiffusion
from bd3_scale.recipe.schema import ModelConfig

pytestmark = pytest.mark.usefixtures("world_of_one")
LENGTH, WORDS = 16, 11

OBJECTIVES: dict[str, Objective] = {
    "bd3": BlockDiffusion(WORDS, LENGTH, 4, pad_to=8),
    "bd3, documents": BlockDiffusion(WORDS, LENGTH, 4, document_end=3),
    "bd3, resampled": BlockDiffusion(WORDS, LENGTH, 8, (0.3, 0.8), resample=True),
    "mdlm": MaskedDiffusion(WORDS, LENGTH),
    "sedd": ScoreEntropy(WORDS, LENGTH),
    "ssdlm": SimplexDiffusion(WORDS, LENGTH, 8),
    "ar": Autoregressive(WORDS, LENGTH, pad_to=32),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def _network(objective: Objective) -> Transformer:
    conditioning = {"conditioning": "adaln", "conditioning_size": 16} if objective.traits.noise_conditioned else {}
    config = ModelConfig(context=LENGTH, layers=2, hidden=32, heads=4, dropout=0.2, **conditioning)  # type: ignore[arg-type]
    model = Transformer(config, WORDS + 1, WORDS).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2, generator=generator)
    return model


def _laid_out(objective: Objective, slots: list[int], real: int) -> NetworkInputs:
    rows = np.random.default_rng(0).integers(0, WORDS, (6, LENGTH))
    return scored_rows(objective.training_inputs(rows[slots], np.array(slots), 4, 7, 6), real)


def _loss_and_gradients(model: Transformer, *micro_batches: NetworkInputs) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    losses = torch.stack([model(inputs)[0] for inputs in micro_batches])
    losses.sum().backward()
    return losses.detach().sum(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@every_objective
def test_filler_adds_exactly_nothing(name: str) -> None:
    """A micro-batch that is all filler has loss 0 and gradients of exact zeros, in every parameter; joined to a batch, it changes no
    bit of that batch's."""
    model, objective = _network(OBJECTIVES[name]), OBJECTIVES[name]
    real, empty = _laid_out(objective, [0, 3], 2), _laid_out(objective, [3, 3], 0)
    loss, gradients = _loss_and_gradients(model, empty)
    assert loss == 0 and len(gradients) == len(list(model.parameters()))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    alone, joined = _loss_and_gradients(model, real), _loss_and_gradients(model, real, empty)
    assert torch.equal(alone[0], joined[0]) and alone[0] != 0
    assert all(torch.equal(one, other) for one, other in zip(alone[1], joined[1], strict=True))


@every_objective
def test_rows_beside_filler_count_as_without_it(name: str) -> None:
    """Sums in another order: to rounding. What filler itself is does not matter at all."""
    model, objective = _network(OBJECTIVES[name]), OBJECTIVES[name]
    loss, gradients = _loss_and_gradients(model, _laid_out(objective, [1, 4], 2))
    gradients = [gradient.clone() for gradient in gradients]
    for filler in ([4, 4], [0, 5]):
        found, others = _loss_and_gradients(model, _laid_out(objective, [1, 4, *filler], 2))
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(one.abs().max())))


@every_objective
def test_filler_is_padding(name: str) -> None:
    """The entries of real rows stay, in front; all others are as padding is, and no shape changes."""
    objective = OBJECTIVES[name]
    whole, part = _laid_out(objective, [5, 2, 2], 3), _laid_out(objective, [5, 2, 2], 2)
    ours = int((_laid_out(objective, [5, 2], 2).weights > 0).sum())
    assert len(part.selected) == len(whole.selected) and torch.equal(part.tokens, whole.tokens)
    for values, expected in ((part.selected, whole.selected), (part.targets, whole.targets), (part.weights, whole.weights)):
        assert torch.equal(values[:ours], expected[:ours]) and not values[ours:].any()
    assert scored_rows(whole, 3) is whole
