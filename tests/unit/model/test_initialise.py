"""Initial weights belong to (seed, name): whoever holds a part of a parameter holds that part of the same values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bd3_scale.model import initialise as module
from bd3_scale.model.config import ModelConfig
from bd3_scale.model.initialise import initial_rows, initialise
from bd3_scale.model.layers import parameter_partition
from bd3_scale.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("world_of_one")

VOCABULARY = 48
PAPER = ModelConfig(hidden=64, heads=4, layers=3, mlp_bias=True, head_bias=True, conditioning="adaln", conditioning_size=16)
LLAMA = ModelConfig(hidden=64, heads=8, key_value_heads=4, layers=2, mlp="swiglu", norm="rmsnorm", tied_head=True)


def weights(config: ModelConfig, seed: int = 0, tensor_rank: int = 0, tensor: int = 1) -> dict[str, Tensor]:
    """What one of `tensor` ranks holds. One process makes all of them: the network is made whole, and cut."""
    model = Transformer(config, VOCABULARY, VOCABULARY - 1)
    for parameter in model.parameters():
        dimension, _ = parameter_partition(parameter)
        shape = list(parameter.shape)
        if dimension >= 0:
            shape[dimension] //= tensor
        parameter.data = torch.full(shape, math.nan)
    initialise(model, config, seed, tensor_rank, tensor)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("strip", [5, 1024], ids=["strips_across_ranks", "one_strip"])
@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("config", [PAPER, LLAMA], ids=["paper", "llama"])
def test_values_do_not_depend_on_the_tensor_size(config: ModelConfig, tensor: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRIP", strip)
    whole, model = weights(config), Transformer(config, VOCABULARY, VOCABULARY - 1)
    ranks = [weights(config, 0, rank, tensor) for rank in range(tensor)]
    divided = 0
    for name, parameter in model.named_parameters():
        dimension, _ = parameter_partition(parameter)
        divided += dimension >= 0
        held = [rank[name] for rank in ranks]
        assert whole[name].isfinite().all(), name
        if dimension < 0:
            assert all(torch.equal(one, whole[name]) for one in held), name
        else:
            assert torch.equal(torch.cat(held, dimension), whole[name]), name
    assert divided >= 5 * config.layers


def test_any_rows_are_those_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRIP", 7)
    shape = torch.Size([40, 3])
    whole = initial_rows("embedding.weight", shape, PAPER, 3, 0, 40)
    for first in range(40):
        for last in range(first + 1, 41):
            assert torch.equal(initial_rows("embedding.weight", shape, PAPER, 3, first, last), whole[first:last])


@pytest.mark.parametrize("config", [PAPER, LLAMA], ids=["paper", "llama"])
def test_scales(config: ModelConfig) -> None:
    """Norms 1; biases and modulations 0; the rest normal with initial_std, over sqrt(2 layers) into the residual stream."""
    for name, value in weights(config).items():
        if "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("bias") or "modulation" in name:
            assert (value == 0).all(), name
        else:
            into_stream = name.endswith(("attention.output.weight", "mlp.down.weight"))
            std = config.initial_std / math.sqrt(2 * config.layers) if into_stream else config.initial_std
            normal = value.double() / std
            assert abs(normal.mean()) < 5 / math.sqrt(value.numel()), name
            assert abs(normal.square().mean() - 1) < 5 * math.sqrt(2 / value.numel()), name
            assert abs(normal.pow(4).mean() - 3) < 5 * math.sqrt(96 / value.numel()), name


def test_every_name_strip_and_seed_has_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRIP", 16)
    strips = [
        strip.flatten()
        for seed in (0, 1)
        for name, value in weights(PAPER, seed).items()
        if value.dim() == 2 and value.any()
        for strip in value.split(16)
        if strip.shape == (16, 64)
    ]
    normal = torch.stack([strip / strip.norm() for strip in strips])
    correlation = (normal @ normal.t()).fill_diagonal_(0)
    assert len(strips) > 100 and correlation.abs().max() < 6 / math.sqrt(16 * 64)


def test_the_seed_is_all_there_is() -> None:
    """No state of torch is read, none is changed; every weight that is drawn is one that the seed decides."""
    torch.manual_seed(1)
    first = weights(PAPER, 5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    model = Transformer(PAPER, VOCABULARY, VOCABULARY - 1)
    torch.set_rng_state(state)
    initialise(model, PAPER, 5)
    assert torch.equal(torch.get_rng_state(), state)
    other = weights(PAPER, 6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, first[name]), name
        drawn = bool(parameter.std() > 0)
        assert torch.equal(other[name], first[name]) != drawn, name
