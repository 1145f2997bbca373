"""Filling and prompts do not count: loss and gradients are those of the same documents without them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from bd3_scale.data.counted import uncounted
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives import noise
from bd3_scale.objectives.noise import LINEAR
from bd3_scale.objectives.table import Autoregressive, BlockDiffusion, NetworkInputs, SimplexDiffusion
from bd3_scale.recipe.schema import ModelConfig

pytestmark = pytest.mark.usefixtures("world_of_one")
WORDS, CONTEXT, LENGTHS = 7, 24, (12, 20)
"""Id 0 is the end of text; MASK is 7."""
MASK = WORDS

Made = Callable[[np.ndarray, np.ndarray], NetworkInputs]
"""Rows [m, L], which documents they hold [m] -> inputs whose noise at a position depends on the document alone."""


def bd3(rows: np.ndarray, which: np.ndarray, block_size: int = 4) -> NetworkInputs:
    numbers = np.random.default_rng(0)
    masked, times = numbers.random((2, CONTEXT)) < 0.6, numbers.uniform(0.2, 1.0, (2, CONTEXT // block_size))
    length = rows.shape[1]
    objective = BlockDiffusion(MASK, length, block_size)
    keys = np.zeros(len(rows), np.int64)
    return objective._inputs(rows, masked[which, :length], times[which, : length // block_size], LINEAR, keys, objective.pattern)


def ssdlm(rows: np.ndarray, which: np.ndarray) -> NetworkInputs:
    keys, times = noise.simplex_keys(0, 0, np.arange(2), CONTEXT), np.random.default_rng(0).uniform(0.2, 1.0, (2, CONTEXT // 4))
    length = rows.shape[1]
    objective = SimplexDiffusion(MASK, length, 4)
    of_rows = times[which, : length // 4], keys[which, :length], np.zeros(len(rows), np.int64)
    return objective._inputs(rows, *of_rows, objective.pattern)


def ar(rows: np.ndarray, which: np.ndarray) -> NetworkInputs:
    return Autoregressive(MASK, rows.shape[1]).validation_inputs(rows, which, 0)


def network(conditioning: str) -> Transformer:
    model = Transformer(ModelConfig(context=CONTEXT, layers=2, hidden=32, heads=4, conditioning=conditioning), MASK + 1, MASK)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.05, generator=generator)  # well-conditioned
    return model


@pytest.mark.parametrize("inputs_of", [bd3, ssdlm, ar])
def test_filling_changes_nothing(inputs_of: Made) -> None:
    """Documents that end at the end of a block, in one batch of filled rows, and each in a row of its own length."""
    model = network("adaln" if inputs_of is ssdlm else "none")
    documents = [np.append(np.random.default_rng(length).integers(1, WORDS, length - 1), 0) for length in LENGTHS]
    filled = np.full((2, CONTEXT), uncounted(np.int64(0)))
    for row, document in zip(filled, documents, strict=True):
        row[: len(document)] = document

    def trained(parts: list[NetworkInputs]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        tokens = sum(int(part.counted.sum()) for part in parts)
        losses = [model(part)[0] / tokens for part in parts]
        torch.stack(losses).sum().backward()
        return float(torch.stack(losses).sum().detach()), [
            parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
        ]

    alone = trained([inputs_of(document[None], np.array([number])) for number, document in enumerate(documents)])
    together = trained([inputs_of(filled, np.arange(2))])
    assert together[0] == pytest.approx(alone[0], rel=1e-6) and alone[0] > 1
    for one, other in zip(alone[1], together[1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6 * float(one.abs().max()))
