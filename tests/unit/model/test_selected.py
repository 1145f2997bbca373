"""The last layer computes the selected rows alone, and nothing else changes: loss, nll and gradients are those of all rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bd3_scale import recipe as recipes
from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.compiling import wrap_blocks
from bd3_scale.distributed.sequence_shards import Stream
from bd3_scale.model.selected import SelectedRows
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import (
    Autoregressive,
    BlockDiffusion,
    MaskedDiffusion,
    NetworkInputs,
    ObjectiveSchedule,
    ScoreEntropy,
    SimplexDiffusion,
    selected_multiple,
)
from tests.unit.model.test_transformer import LENGTH, MASK, VARIANTS, gradients, network

pytestmark = pytest.mark.usefixtures("world_of_one")

SAMPLES, INTERVAL = 3, (0.3, 0.9)
OBJECTIVES: dict[str, Any] = {
    "L'=4": BlockDiffusion(MASK, LENGTH, 4, INTERVAL),
    "L'=1": BlockDiffusion(MASK, LENGTH, 1, INTERVAL),
    "L'=L": BlockDiffusion(MASK, LENGTH, LENGTH, INTERVAL),
    "causal clean half": BlockDiffusion(MASK, LENGTH, 4, INTERVAL, clean_half="causal"),
    "documents": BlockDiffusion(MASK, LENGTH, 4, INTERVAL, document_end=0),
    "3 draws": BlockDiffusion(MASK, LENGTH, 4, INTERVAL, draws=3),
    "padded": BlockDiffusion(MASK, LENGTH, 4, INTERVAL, pad_to=64),
    "nothing masked": BlockDiffusion(MASK, LENGTH, 4, (1e-12, 1e-12), pad_to=8),
    "mdlm": MaskedDiffusion(MASK, LENGTH, INTERVAL),
    "sedd": ScoreEntropy(MASK, LENGTH, INTERVAL),
}


def inputs_of(objective: Any) -> NetworkInputs:
    rows = np.random.default_rng(4).integers(0, MASK, (SAMPLES, LENGTH))
    inputs: NetworkInputs = objective.training_inputs(rows, np.arange(SAMPLES), 0, 0, SAMPLES)
    return inputs


def results(model: Transformer, inputs: NetworkInputs) -> dict[str, Tensor]:
    total, nll = model(inputs)
    total.backward()
    return {"loss": total.detach(), "nll": nll, **gradients(model)}


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_selected_rows_alone_give_what_all_rows_give(variant: str, kind: str) -> None:
    """With dropout, whose mask a row has wherever it lies; sedd tells every sample its own noise."""
    if kind == "sedd":
        variant = {"gpt": "adaln"}.get(variant, "")
        if not variant:
            pytest.skip("sedd needs adaLN")
    model, inputs = network(variant, dropout=0.2), inputs_of(OBJECTIVES[kind])
    assert inputs.sparse
    expected, found = results(model, replace(inputs, sparse=False)), results(model, inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * max(1.0, float(value.abs().max())), msg=name)


@pytest.mark.parametrize("kernel", ["dense", "tiled"])
def test_every_kernel_takes_queries_of_few_rows(kernel: str) -> None:
    model, inputs = network("llama", attention=kernel, layers=1), inputs_of(OBJECTIVES["L'=4"])
    expected, found = results(model, replace(inputs, sparse=False)), results(model, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * max(1.0, float(value.abs().max())), msg=name)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_only_selected_rows_are_computed_in_the_last_layer(kind: str) -> None:
    """Queries, attention output and MLP, as their linears see it; keys and values of all rows, and all rows before."""
    model, inputs = network("adaln"), inputs_of(OBJECTIVES[kind])
    n, everything = len(inputs.selected), inputs.pattern.rows * SAMPLES
    seen = linear_rows(model, inputs)
    for layer in range(3):
        last = {"attention.query": n, "attention.output": n, "mlp.up": n, "mlp.down": n} if layer == 2 else {}
        for name in ("attention.query", "attention.key_value", "attention.output", "mlp.up", "mlp.down"):
            assert seen[f"blocks.{layer}.{name}"] == last.get(name, everything), (layer, name)
    assert seen["final_norm"] == n


@pytest.mark.parametrize(
    "objective", [Autoregressive(MASK, LENGTH), SimplexDiffusion(MASK, LENGTH, 4, INTERVAL)], ids=lambda objective: objective.kind
)
def test_objectives_that_score_every_row_are_not_selected_from(objective: Any) -> None:
    model, inputs = network("adaln" if objective.traits.noise_conditioned else "gpt"), inputs_of(objective)
    assert not inputs.sparse
    seen = linear_rows(model, inputs)
    assert seen["blocks.2.mlp.up"] == LENGTH * SAMPLES and seen["final_norm"] == len(inputs.selected)
    if objective.traits.noise_conditioned:
        with pytest.raises(ValueError, match="each block"):
            model(replace(inputs, sparse=True))


@pytest.mark.parametrize("part", ["attention", "mlp", "layer"])
def test_recomputed_selected_rows_give_the_same_bits(part: str) -> None:
    found = []
    for recompute in ("none", part):
        model = network("adaln", dropout=0.2)
        wrap_blocks(model.blocks.values(), recompute=recompute, compile="none")
        found.append(results(model, inputs_of(OBJECTIVES["sedd"])))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_rows_are_found_where_they_were() -> None:
    """Taken, spread and collected, on one rank."""
    stream = Stream(AttentionPattern("block_diffusion", 6, 2, last_clean=False))
    selected = torch.tensor([1, 5, 6, 10])  # rows 1 and 5 of sample 0, 0 and 4 of sample 1
    rows = SelectedRows.of(selected, stream, 2)
    x = torch.arange(10 * 2, dtype=torch.float32).view(10, 2, 1)
    assert rows.take(x).flatten().tolist() == [2, 10, 1, 9]
    assert (rows.samples.tolist(), rows.row_ids.tolist()) == ([0, 0, 1, 1], [1, 5, 0, 4])
    spread = rows.spread(rows.take(x)[..., None] + 1)
    assert spread.shape == (6, 2, 1, 1) and spread.flatten().tolist() == [0, 2, 3, 0, 0, 0, 0, 0, 0, 10, 11, 0]
    assert torch.equal(rows.collect(spread[..., 0]), rows.take(x) + 1)
    with pytest.raises(ValueError, match="3 tensor ranks"):
        SelectedRows.of(selected, replace(stream, ranks=3), 2)


@pytest.mark.parametrize(("device", "tensor", "multiple"), [("cpu", 1, 1), ("cpu", 4, 4), ("cuda", 4, 256), ("cuda", 3, 768)])
def test_positions_are_selected_in_numbers_that_ranks_can_divide(device: str, tensor: int, multiple: int, base: Path) -> None:
    recipe = recipes.load(base, [f"parallel.tensor={tensor}", "parallel.sequence=true"])
    objective: Any = ObjectiveSchedule.of(recipe, MASK, device=device).at(0)
    assert objective.pad_to == multiple == selected_multiple(recipe.parallel, device)


def linear_rows(model: Transformer, inputs: NetworkInputs) -> dict[str, int]:
    """Vectors that each module was given."""
    seen: dict[str, int] = {}

    def note(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, arguments: seen.__setitem__(name, arguments[0].shape[:-1].numel()))

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("query", "key_value", "output", "up", "down", "final_norm"):
            note(name, module)
    model(inputs)
    return seen
