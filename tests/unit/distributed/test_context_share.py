"""Shares of a micro-batch: together the undivided one, each as busy as the others, whatever the objective; padding adds nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from bd3_scale.attention.mask import AttentionPattern, dense
from bd3_scale.distributed.context_share import ContextShare
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import Autoregressive, BlockDiffusion, MaskedDiffusion, Objective, ScoreEntropy, SimplexDiffusion
from bd3_scale.recipe.schema import ModelConfig

LENGTH, WORDS, ROWS = 48, 11, 3
OBJECTIVES: dict[str, Objective] = {
    "bd3": BlockDiffusion(WORDS, LENGTH, 6, row_multiple=LENGTH),
    "bd3, documents, draws": BlockDiffusion(WORDS, LENGTH, 3, document_end=3, row_multiple=LENGTH, draws=2),
    "bd3, one token": BlockDiffusion(WORDS, LENGTH, 1, row_multiple=LENGTH),
    "bd3, a block a rank": BlockDiffusion(WORDS, LENGTH, 12, row_multiple=LENGTH),
    "bd3, one block": BlockDiffusion(WORDS, LENGTH, LENGTH, draws=2),
    "mdlm": MaskedDiffusion(WORDS, LENGTH),
    "sedd": ScoreEntropy(WORDS, LENGTH),
    "ssdlm": SimplexDiffusion(WORDS, LENGTH, 6, row_multiple=LENGTH, draws=2),
    "ssdlm, one block": SimplexDiffusion(WORDS, LENGTH, LENGTH),
    "ar": Autoregressive(WORDS, LENGTH, document_end=3),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shares_hold_every_row_and_every_scored_position_once(name: str) -> None:
    rows = np.random.default_rng(0).integers(0, WORDS, (ROWS, LENGTH))
    whole = OBJECTIVES[name].training_inputs(rows, np.arange(ROWS), 4, 7, ROWS)
    pattern, found = whole.pattern, torch.zeros(len(whole.selected))
    held = torch.zeros(pattern.rows, dtype=torch.int64)
    for rank in range(4):
        share = ContextShare(rank, 4, pad_to=8)
        inputs = share.of(whole)
        ids = inputs.pattern.undivided_rows(torch.arange(inputs.pattern.rows))
        held[ids] += 1
        assert torch.equal(inputs.tokens, whole.tokens[:, ids]) and torch.equal(inputs.positions, whole.positions[ids])
        sample, place = inputs.selected // inputs.pattern.scored_rows, inputs.selected % inputs.pattern.scored_rows
        answers = (sample * pattern.scored_rows + inputs.pattern.undivided_rows(place)).float()  # where in the undivided micro-batch
        found += share.joined(whole, answers)
        real = inputs.weights > 0
        assert inputs.weights.sum() == pytest.approx(float(share.joined(whole, inputs.weights).sum()))
        assert torch.equal(share.joined(whole, inputs.targets.float()).long()[share.joined(whole, real.float()) > 0], inputs.targets[real])
        if whole.noise_levels is not None and whole.noise_levels.dim() == 2:
            levels = whole.noise_levels[:, torch.arange(pattern.scored_rows) // pattern.block_size][:, ids[: inputs.pattern.scored_rows]]
            place = torch.arange(inputs.pattern.scored_rows) // inputs.pattern.block_size
            assert inputs.noise_levels is not None and torch.equal(inputs.noise_levels[:, place], levels)
        if whole.simplex is not None:
            assert inputs.simplex is not None
            assert torch.equal(inputs.simplex.keys, whole.simplex.keys[:, ids[: inputs.pattern.scored_rows]])
    assert torch.equal(held, torch.ones_like(held)), "each row on one rank"
    assert torch.equal(found, whole.selected.float()), "each answer from one rank, in its place"


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["block_diffusion", "causal", "full"])
def test_every_rank_sees_as_much(kind: str, ranks: int) -> None:
    """As many pairs on each, counted in the mask; a rank with a block alone differs by blocks."""
    for block in (1, 4, 16) if kind == "block_diffusion" else (1,):
        for clean_half, draws in (("block_causal", 1), ("causal", 2)) if kind == "block_diffusion" else (("block_causal", 1),):
            pattern = AttentionPattern(kind, 4 * 16 * ranks, block, clean_half, draws=draws)  # type: ignore[arg-type]
            shares = [pattern.share(rank, ranks) for rank in range(ranks)]
            pairs = [share.visible_pairs for share in shares]
            assert len(set(pairs)) == 1 and sum(pairs) == pattern.visible_pairs
            assert pairs[0] == int(dense(shares[0]).sum())
    alone = AttentionPattern("block_diffusion", 16 * ranks, 16)
    found = [alone.share(rank, ranks).visible_pairs for rank in range(ranks)]
    assert [b - a for a, b in pairwise(found)] == [2 * 16 * 16] * (ranks - 1)


def test_what_travels_is_the_clean_half_alone() -> None:
    share = AttentionPattern("block_diffusion", 4096, 16).share(1, 4)
    assert share.key_rows - share.own_keys == 4096, "of 2 x 4096 rows of the network"


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("exact", [False, True])
def test_padding_of_a_share_adds_nothing(exact: bool) -> None:
    """Also where every row of a share is scored, and there is no other to repeat."""
    interval = (1.0, 1.0) if exact else (0.3, 0.9)
    objective = BlockDiffusion(WORDS, LENGTH, 3, interval, row_multiple=LENGTH)
    rows = np.random.default_rng(0).integers(0, WORDS, (ROWS, LENGTH))
    whole = objective.training_inputs(rows, np.arange(ROWS), 4, 7, ROWS)
    config = ModelConfig(context=LENGTH, layers=2, hidden=32, heads=4, dropout=0.2)
    model = Transformer(config, WORDS + 1, WORDS).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    found = []
    for pad_to in (1, 50):
        # As an undivided row: what others would send is no matter here.
        inputs = replace(ContextShare(1, 4, pad_to).of(whole), pattern=AttentionPattern("block_diffusion", LENGTH // 4, 3))
        model.zero_grad()
        loss = model(inputs)[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for left, right in zip(*found, strict=True):
        assert (left - right).abs().max() <= 1e-5 * right.abs().max()
