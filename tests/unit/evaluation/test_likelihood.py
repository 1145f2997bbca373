"""Likelihood on prepared rows: it is what its definition says, of all rows, and only of rows that fit the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bd3_scale.data.tokenizer import GPT2Tokenizer
from bd3_scale.distributed.layout import Layout
from bd3_scale.errors import DataError, RecipeError
from bd3_scale.evaluation import world
from bd3_scale.evaluation.likelihood import evaluate_likelihood, open_rows
from bd3_scale.evaluation.world import load_replicas
from bd3_scale.generation import load_model
from tests.unit.evaluation.conftest import save_data

Checkpoints = Callable[..., Path]


def test_next_token_likelihood_is_that_of_the_chain_rule(checkpoint: Checkpoints, data: Path) -> None:
    """Row by row, token by token, each predicted by a forward on the tokens before it."""
    loaded, layout = load_replicas(checkpoint(kind="ar"), device="cpu")
    with open_rows(data, "validation", loaded) as rows:
        result = evaluate_likelihood(loaded, rows, layout, count=3, micro_batch=2)
        tokens = torch.from_numpy(rows.rows(np.arange(3)).astype(np.int64))
    expected = torch.zeros(3, dtype=torch.float64)
    for stop in range(1, tokens.shape[1]):
        mask = torch.ones(stop, stop, dtype=torch.bool).tril()
        logits = loaded.network.decode(tokens[:, :stop], torch.arange(stop), None, mask, last=1)[:, 0]
        expected -= logits.double().log_softmax(-1).gather(1, tokens[:, stop : stop + 1])[:, 0]
    np.testing.assert_allclose(result.row_nelbo, (expected / (tokens.shape[1] - 1)).numpy(), rtol=1e-5)
    assert result.exact and result.draws == 1 and (result.row_tokens == 15).all()
    assert math.isclose(result.perplexity, math.exp(result.row_nelbo.mean()))
    assert math.isclose(result.standard_error, result.row_nelbo.std(ddof=1) / math.sqrt(3))


@pytest.mark.parametrize("objective", [{"block_size": 4}, {"kind": "mdlm"}])
def test_draws_are_averaged_and_nothing_depends_on_the_micro_batch(objective: dict, checkpoint: Checkpoints, data: Path) -> None:
    loaded, layout = load_replicas(checkpoint(**objective), device="cpu")
    with open_rows(data, "validation", loaded) as rows:
        first, second = (evaluate_likelihood(loaded, rows, layout, seed=seed).row_nelbo for seed in (5, 6))
        both = evaluate_likelihood(loaded, rows, layout, seed=5, draws=2, micro_batch=3)
        assert len(first) == len(rows) > 20 and not np.allclose(first, second)
    np.testing.assert_allclose(both.row_nelbo, (first + second) / 2, rtol=1e-6)
    assert not both.exact and both.draws == 2


def test_the_bound_of_small_blocks_lies_above_the_exact_likelihood_of_one_token_blocks(checkpoint: Checkpoints, data: Path) -> None:
    """L' = 1 masks every token once: no noise, and the same number for any seed."""
    loaded, layout = load_replicas(checkpoint(block_size=1), device="cpu")
    with open_rows(data, "validation", loaded) as rows:
        results = [evaluate_likelihood(loaded, rows, layout, seed=seed) for seed in (1, 2)]
        with pytest.raises(RecipeError, match="exact likelihood"):
            evaluate_likelihood(loaded, rows, layout, draws=2)
    np.testing.assert_array_equal(results[0].row_nelbo, results[1].row_nelbo)
    assert results[0].exact


@pytest.mark.parametrize(
    ("objective", "context", "reason"),
    [
        ({"block_size": 4}, 8, "a row of 4 blocks of objective.block_size = 4 in 16 equal pieces"),
        ({"kind": "ar"}, 12, "a row of 16 positions in 24 equal pieces"),
        ({"kind": "mdlm"}, 12, "must divide model.context = 16"),
    ],
)
def test_rows_that_context_ranks_cannot_divide_are_refused_before_a_network_is_made(
    objective: dict, context: int, reason: str, checkpoint: Checkpoints, world_of_one: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = checkpoint(**objective)
    monkeypatch.delattr(load_model, "Transformer")
    with pytest.raises(RecipeError, match=f"{context} processes cannot divide a row: .*{reason}.*; set --context 4$") as refused:
        load_model.load_network(run, device="cpu", context=context)
    assert "\n" not in str(refused.value)


def test_a_world_must_be_whole_groups_of_context_ranks(
    checkpoint: Checkpoints, world_of_one: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = checkpoint(block_size=4)
    monkeypatch.setattr(world.parallel_state, "model_parallel_is_initialized", lambda: False)
    monkeypatch.setattr(world.dist, "get_world_size", lambda: 6)
    for context, tensor, reason in ((4, 1, "processes, 6; set"), (2, 2, "processes, 6, over tensor = 2; set"), (0, 1, "processes, 6; set")):
        with pytest.raises(RecipeError, match=f"context is {context} .*{reason}"):
            load_replicas(run, context=context, tensor=tensor, device="cpu")


def test_rows_that_do_not_fit_the_checkpoint_are_refused(checkpoint: Checkpoints, data: Path, tmp_path: Path, world_of_one: Layout) -> None:
    loaded, _ = load_replicas(checkpoint(block_size=4), device="cpu")
    others = {
        "with a vocabulary of 50257": save_data(tmp_path / "tokenizer", tokenizer=GPT2Tokenizer()),
        "context 8": save_data(tmp_path / "context", context=8),
        "special tokens 'none'": save_data(tmp_path / "special", row_special="none"),
        "holds no manifest": tmp_path,
    }
    for reason, folder in others.items():
        with pytest.raises(DataError, match=reason) as refused:
            open_rows(folder, "validation", loaded)
        assert "\n" not in str(refused.value)
    with pytest.raises(RecipeError, match="split is 'test'"):
        open_rows(data, "test", loaded)
