"""Initial weights belong to (seed, name): whoever holds a part of a parameter holds that part of the same values."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bd3_scale.checkpoint.region import Region
from bd3_scale.engines import initialise as module
from bd3_scale.engines.initialise import fill, initial_rows, initialise
from bd3_scale.model.layers import ColumnLinear, Embedding, RowLinear, TensorParallelFactory, full_shape, parameter_partition
from bd3_scale.model.transformer import Transformer
from bd3_scale.recipe.schema import ModelConfig

pytestmark = pytest.mark.usefixtures("world_of_one")

VOCABULARY = 48
PAPER = ModelConfig(hidden=64, heads=4, layers=3, mlp_bias=True, head_bias=True, conditioning="adaln", conditioning_size=16)
LLAMA = ModelConfig(hidden=64, heads=8, key_value_heads=4, layers=2, mlp="swiglu", norm="rmsnorm", tied_head=True)
GPT2 = ModelConfig(hidden=64, heads=4, layers=3, positions="learned", attention_bias="all", norm_bias=True, mlp_bias=True, tied_head=True)
QWEN = ModelConfig(hidden=64, heads=8, key_value_heads=4, layers=2, head_width=12, norm="rmsnorm", query_key_norm=True)
TIED = ModelConfig(hidden=64, heads=4, layers=3, tied_head=True, head_bias=True, conditioning="adaln", conditioning_size=16)
SHARED = ModelConfig(hidden=64, heads=8, key_value_heads=1, layers=2, mlp="swiglu", mlp_bias=True)
"""Fewer key/value heads than tensor ranks."""


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
@pytest.mark.parametrize("config", [PAPER, LLAMA, GPT2, QWEN], ids=["paper", "llama", "gpt2", "qwen"])
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


@pytest.mark.parametrize("config", [PAPER, LLAMA, GPT2, QWEN], ids=["paper", "llama", "gpt2", "qwen"])
def test_scales(config: ModelConfig) -> None:
    """Norms 1; biases and modulations 0; the rest normal with initial_std, over sqrt(2 layers) into the residual stream."""
    for name, value in weights(config).items():
        if name.endswith("bias") or "modulation" in name:
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
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


# -- Real tensor ranks and stages: their own modules, with padding -------------------------------------------------------


class OneOf(TensorParallelFactory):
    """What tensor rank `rank` of `tensor` makes, in a world of one: the group says one, so that its sizes are divided here."""

    def __init__(self, rank: int, tensor: int, multiple: int) -> None:
        super().__init__(vocabulary_multiple=multiple)
        self.tensor, self.tensor_rank = tensor, rank

    def column(self, inputs: int, outputs: int, bias: bool = False) -> ColumnLinear:
        assert outputs % self.tensor == 0
        return super().column(inputs, outputs // self.tensor, bias)

    def row(self, inputs: int, outputs: int, bias: bool = False) -> RowLinear:
        assert inputs % self.tensor == 0
        return super().row(inputs // self.tensor, outputs, bias)

    def embedding(self, vocabulary: int, hidden: int) -> Embedding:
        embedding = super().embedding(vocabulary, hidden)
        embedding.weight.data = embedding.weight.data[: self.padded(vocabulary) // self.tensor].clone()
        return embedding


def made_by(config: ModelConfig, vocabulary: int, rank: int, tensor: int, multiple: int) -> Transformer:
    model = Transformer(config, vocabulary, vocabulary - 1, OneOf(rank, tensor, multiple))
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    initialise(model, config, 3, rank, tensor)
    return model


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("config", [PAPER, LLAMA, SHARED], ids=["paper", "llama", "shared_key_value"])
def test_tensor_ranks_together_have_the_weights_of_one(config: ModelConfig, tensor: int, multiple: int) -> None:
    """For a vocabulary that no size divides: behind its end there are zeros, and nothing else of a rank is padding."""
    vocabulary = 13
    whole = dict(made_by(config, vocabulary, 0, 1, 1).named_parameters())
    ranks = [dict(made_by(config, vocabulary, rank, tensor, multiple).named_parameters()) for rank in range(tensor)]
    padding = 0
    for name, expected in whole.items():
        held = [rank[name] for rank in ranks]
        for one in held:
            shape, dimension = full_shape(one, tensor)
            assert shape == tuple(expected.shape), name
        if dimension < 0:
            assert all(torch.equal(one, expected) for one in held), name
            continue
        together = torch.cat([one.detach() for one in held], dimension)
        assert torch.equal(together.narrow(dimension, 0, expected.shape[dimension]), expected), name
        rest = together.narrow(dimension, expected.shape[dimension], together.shape[dimension] - expected.shape[dimension])
        assert (rest == 0).all() and (rest.numel() == 0 or dimension == 0), name
        padding += rest.numel()
    assert (padding > 0) == (tensor * multiple > 1)


@pytest.mark.parametrize("bounds", [[0, 2, 3], [0, 1, 2, 3]], ids=["two_stages", "three_stages"])
@pytest.mark.parametrize("config", [PAPER, TIED], ids=["paper", "tied"])
def test_stages_together_are_the_network(config: ModelConfig, bounds: list[int]) -> None:
    """Same names, same values; more than one stage has only what all (the condition) or both ends (a tied embedding) need."""
    whole = weights(config, 3)
    held: dict[str, int] = {}
    for first, last in pairwise(bounds):
        stage = Transformer(config, VOCABULARY, VOCABULARY - 1, layers=range(first, last))
        initialise(stage, config, 3)
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, whole[name]), name
            held[name] = held.get(name, 0) + 1
    assert held.keys() == whole.keys()
    stages = len(bounds) - 1
    for name, count in held.items():
        tied = config.tied_head and name == "embedding.weight"
        assert count == (stages if name.startswith("condition.") else 2 if tied else 1), name


@pytest.mark.parametrize("strip", [5, 1024])
@pytest.mark.parametrize(("name", "shape"), [("blocks.0.mlp.up.weight", (24, 8)), ("blocks.1.mlp_norm.weight", (24,)), ("x.bias", (24,))])
def test_any_part_of_a_parameter_is_that_part_of_the_whole(
    name: str, shape: tuple[int, ...], strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flat ranges of slices along either dimension, as ZeRO and tensor ranks cut them."""
    monkeypatch.setattr(module, "STRIP", strip)
    whole = initial_rows(name, torch.Size(shape), PAPER, 7, 0, shape[0])
    for dim, extent in enumerate(shape):
        for offset, size in ((0, extent), (extent // 4, extent // 4), (extent // 2, extent - extent // 2)):
            last = math.prod(shape) // extent * size
            for start, stop in ((0, last), (3, last - 2), (last // 2, last // 2 + 1), (last, last)):
                if start <= stop:
                    region = Region(shape, dim, offset, size, start, stop)
                    values = torch.full((stop - start,), math.nan)
                    fill(values, name, region, PAPER, 7)
                    assert torch.equal(values, region.select(whole)), region
