"""Muon is torch's on one matrix, takes packed matrices apart, leaves a step out wholly, and moves no matrix that it need not."""

from __future__ import annotations

import math

import pytest
import torch

from bd3_scale.checkpoint.region import Region
from bd3_scale.optimizers.adamw import SkipStepRule
from bd3_scale.optimizers.matrix_owners import Piece, owners_of
from bd3_scale.optimizers.muon import MOMENTUM, Muon, direction, orthogonal
from bd3_scale.recipe.schema import ModelConfig

CPU = torch.device("cpu")
QUERY, NORM = "blocks.0.attention.query.weight", "blocks.0.mlp_norm.weight"


def optimizer(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Muon, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, requires_grad=True), torch.randn(5, generator=generator, requires_grad=True)]
    groups = [{"params": weights[1:], "weight_decay": 0.0}, {"params": weights[:1], "weight_decay": 0.1, "momentum": 0.95}]
    muon = Muon(groups, (0.9, 0.95), 1e-8, SkipStepRule(0.0, CPU), ModelConfig(hidden=shape[1]), dtype)
    muon.bind([[(weights[0], [(0, Piece((QUERY, 0), Region.whole(shape)))])]], None, CPU)
    for group in muon.param_groups:
        group["lr"] = 1e-2
    return muon, weights


def step(muon: Muon, weights: list[torch.Tensor], number: int, norm: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(number)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator) if math.isfinite(norm) else torch.full(weight.shape, math.nan)
    muon.begin(lambda: torch.tensor(norm))
    muon.step()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 8)])
def test_it_is_muon_of_torch(shape: tuple[int, int]) -> None:
    muon, (weight, vector) = optimizer(shape, torch.bfloat16)
    copy, plain = (tensor.detach().clone().requires_grad_() for tensor in (weight, vector))
    reference = torch.optim.Muon([copy], lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([plain], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        copy.grad, plain.grad = torch.randn(shape, generator=generator), torch.randn(5, generator=generator)
        reference.step()
        adam.step()
        step(muon, [weight, vector], number)
    torch.testing.assert_close(weight, copy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vector, plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(muon.state[weight][MOMENTUM], reference.state[copy]["momentum_buffer"])
    assert muon.states(weight).keys() == {MOMENTUM} and muon.states(vector).keys() == {"exp_avg", "exp_avg_sq"}


def test_it_makes_orthogonal() -> None:
    matrix = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    singular = torch.linalg.svdvals(orthogonal(matrix))
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert torch.equal(orthogonal(matrix.T), orthogonal(matrix).T)
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_packed_matrices_are_made_orthogonal_one_by_one() -> None:
    """Keys and values alternate by head, gate and value of SwiGLU by unit."""
    config = ModelConfig(hidden=16, heads=4, key_value_heads=3, mlp="swiglu")
    heads = torch.randn(3, 2, 4, 16, generator=torch.Generator().manual_seed(2))
    found = direction("blocks.1.attention.key_value.weight", heads.view(24, 16), config).view(3, 2, 4, 16)
    for index in range(2):
        torch.testing.assert_close(found[:, index].reshape(12, 16), orthogonal(heads[:, index].reshape(12, 16)))
    found = direction("blocks.1.mlp.up.weight", heads.view(24, 16), config)
    for index in range(2):
        torch.testing.assert_close(found[index::2], orthogonal(heads.view(24, 16)[index::2]))
    whole = ModelConfig(hidden=16, heads=4, mlp="gelu")
    torch.testing.assert_close(direction("blocks.1.mlp.up.weight", heads.view(24, 16), whole), orthogonal(heads.view(24, 16)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_left_out_changes_nothing(bad: float) -> None:
    muon, weights = optimizer((12, 20), torch.float32)
    step(muon, weights, 0)
    before = [[tensor.clone() for tensor in (weight, *muon.states(weight).values())] for weight in weights]
    step(muon, weights, 1, bad)
    after = [[weight, *muon.states(weight).values()] for weight in weights]
    assert all(torch.equal(one, other) for pair in zip(before, after, strict=True) for one, other in zip(*pair, strict=True))
    assert muon.rule.counts.tolist() == [1, 1, 1]
    step(muon, weights, 2)
    assert all(not torch.equal(one[0], other[0]) for one, other in zip(before, after, strict=True))


def rows(name: str, shape: tuple[int, int], ranks: int) -> list[Piece]:
    size = shape[0] // ranks
    return [Piece((name, 0), Region.divided(shape, 0, rank * size, size)) for rank in range(ranks)]


def test_owners_hold_the_most_and_take_turns() -> None:
    even = [rows(name, (8, 6), 4) for name in "abcdefgh"]
    owners = owners_of(list(zip(*even, strict=True)))
    assert sorted(owners.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    first, second = (Piece(("a", 0), Region.flat((4, 6), *ends)) for ends in ((0, 15), (15, 24)))
    flat = [[first], [second, Piece(("b", 0), Region.whole((4, 6)))]]
    assert owners_of(flat) == {("a", 0): 0, ("b", 0): 1}
    copies = [[Piece(("a", rank), Region.whole((4, 6)))] for rank in range(2)]
    assert owners_of(copies) == {("a", 0): 0, ("a", 1): 1}
