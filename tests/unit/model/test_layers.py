"""Parts of a layer: dropout that depends on the sample alone, norms in fp32, weights whose division keeps units whole."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_scale.model.attention import Attention
from bd3_scale.model.layers import (
    MLP,
    DropoutWords,
    KeyedDropout,
    Modulation,
    NoiseCondition,
    SharedKeyValue,
    TensorParallelFactory,
    dropout_channels,
    dropout_keys,
    full_shape,
    parameter_partition,
)
from bd3_scale.model.norms import Norm
from bd3_scale.recipe.schema import ModelConfig

pytestmark = pytest.mark.usefixtures("world_of_one")

ROWS, BATCH, HIDDEN = 48, 64, 40


def filled(module: nn.Module, std: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, std, generator=generator)


# -- Dropout -----------------------------------------------------------------------------------------------------------


def kept(probability: float, keys: Tensor, place: int = 3, rows: int = ROWS, hidden: int = HIDDEN) -> Tensor:
    """bool [rows, batch, hidden]."""
    return KeyedDropout(probability, place % 2)(torch.ones(rows, len(keys), hidden), words(keys, place, rows, hidden)) != 0


def words(keys: Tensor, place: int, rows: int, hidden: int) -> DropoutWords:
    """Of place 0 or 1 of layer place // 2."""
    layer = place // 2
    return DropoutWords(dropout_keys(keys, range(layer, layer + 1))[0], torch.arange(rows), dropout_channels(hidden, keys.device))


def random_keys(count: int = BATCH) -> Tensor:
    return torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(5))


def test_dropout_of_a_sample_does_not_depend_on_its_company() -> None:
    """Nor on how many rows the layer computes: not on micro-batches, their order, or the last layer's half."""
    keys = random_keys()
    whole = kept(0.3, keys)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
    assert torch.equal(kept(0.3, keys[order]), whole[:, order])
    for size in (1, 24):
        assert torch.equal(torch.cat([kept(0.3, part) for part in keys.split(size)], 1), whole)
    assert torch.equal(kept(0.3, keys, rows=ROWS // 2), whole[: ROWS // 2])
    assert torch.equal(kept(0.3, keys.new_tensor([7, 7, 8]))[:, 0], kept(0.3, keys.new_tensor([7, 7, 8]))[:, 1])


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_rate_is_the_probability_everywhere(probability: float) -> None:
    """Binomial over all elements; chi-square over rows, samples and channels. Bounds hold all but once in 10^6 draws."""
    mask = kept(probability, random_keys()).double()
    deviation = (mask - (1 - probability)) / math.sqrt(probability * (1 - probability))
    assert abs(deviation.sum()) < 5 * math.sqrt(mask.numel())
    for axes in ((1, 2), (0, 2), (0, 1)):
        sums = deviation.sum(axes) / math.sqrt(mask.numel() / mask.sum(axes).numel())
        degrees = sums.numel()
        assert abs(sums.square().sum() - degrees) < 6 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("keys", [random_keys(), torch.arange(BATCH), 2**32 - 1 - torch.arange(BATCH)], ids=["random", "first", "last"])
def test_dropout_of_different_rows_channels_samples_and_places_is_uncorrelated(keys: Tensor) -> None:
    """Every pair of rows, of channels, of samples, of places: correlations are those of independent bits, also where keys
    or indices are neighbours."""
    places = torch.stack([kept(0.5, keys, place) for place in range(24)])
    for axis in range(4):
        bits = 2.0 * places.movedim(axis, 0).flatten(1).float() - 1
        correlation = (bits @ bits.t() / bits.shape[1]).fill_diagonal_(0)
        assert correlation.abs().max() < 6 / math.sqrt(bits.shape[1])


def test_dropout_never_changes_silently() -> None:
    """The mask, written out in whole numbers: a run that is continued by a later version drops the same."""

    def mix(word: int) -> int:
        word %= 2**32
        word = (word ^ word >> 16) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        return word ^ word >> 16

    def keeps(key: int, place: int, row: int, channel: int) -> bool:
        return mix(mix(mix(key + place * 0x9E3779B9) + row * 0x85EBCA6B) + channel * 0xC2B2AE35) >= int(0.3 * 2**32)

    keys = [0, 1, 2**31, 2**32 - 1, 123456789]
    for place in (0, 23):
        expected = [[[keeps(key, place, row, channel) for channel in range(9)] for key in keys] for row in range(11)]
        assert kept(0.3, torch.tensor(keys), place, 11, 9).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_scales_what_it_keeps_and_its_gradient(dtype: torch.dtype) -> None:
    dropout, keys = KeyedDropout(0.25, 1), random_keys()
    x = torch.randn(ROWS, BATCH, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    out = dropout(x, words(keys, 1, ROWS, HIDDEN))
    mask = kept(0.25, keys, place=1)
    assert out.dtype == dtype and torch.equal(out, torch.where(mask, x / 0.75, 0))
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.where(mask, torch.ones_like(x) / 0.75, 0))


def test_dropout_is_the_identity_in_evaluation_and_at_0() -> None:
    x, hashed = torch.randn(3, 2, 5), words(random_keys(2), 0, 3, 5)
    assert KeyedDropout(0.5, 0).eval()(x, hashed) is x
    assert KeyedDropout(0.0, 0).train()(x, hashed) is x
    assert KeyedDropout(0.5, 0).train()(x, None) is x


# -- Norms and conditioning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_are_torch_s(kind: str, scale: float) -> None:
    norm = Norm(ModelConfig(hidden=HIDDEN, norm=kind))
    filled(norm)
    x = scale * (torch.randn(5, 3, HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.5)
    reference = (nn.LayerNorm(HIDDEN, bias=False) if kind == "layernorm" else nn.RMSNorm(HIDDEN, eps=1e-5)).double()
    reference.load_state_dict({"weight": norm.weight.double()})
    torch.testing.assert_close(norm(x).double(), reference(x.double()), rtol=1e-5, atol=1e-5)
    low = norm(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, norm(x.bfloat16().float()).bfloat16()), "bf16 is rounded once, at the end"


def test_conditioning_is_that_of_the_paper_s_network() -> None:
    """cos, then sin, of sigma times 128 rates from 1 down to almost 1 / 10,000; linear, SiLU, linear, SiLU."""
    config = ModelConfig(hidden=HIDDEN, conditioning="adaln", conditioning_size=16)
    embedding = NoiseCondition(config)
    filled(embedding, 0.1)
    first, second = (module for module in embedding.mlp if isinstance(module, nn.Linear))
    for sigma in (0.0, 0.7, 250.0):
        rates = [10_000.0 ** (-i / 128) for i in range(128)]
        waves = torch.tensor([f(sigma * rate) for f in (math.cos, math.sin) for rate in rates])
        expected = F.silu(second(F.silu(first(waves))))
        torch.testing.assert_close(embedding(torch.tensor([sigma]))[0], expected, rtol=1e-4, atol=1e-5)
    modulation = Modulation(config, 6)
    filled(modulation)
    condition = torch.randn(16, generator=torch.Generator().manual_seed(3))
    chunks = torch.stack(modulation(condition))
    torch.testing.assert_close(chunks, (modulation.weight @ condition + modulation.bias).unflatten(0, (6, HIDDEN)))


# -- the factory and its divisions ----------------------------------------------------------------------------------------


def test_where_parameters_are_divided() -> None:
    factory, config = TensorParallelFactory(), ModelConfig(hidden=8, heads=2, mlp_bias=True)
    column, row, embedding, norm = factory.column(8, 12, bias=True), factory.row(12, 8, bias=True), factory.embedding(10, 8), Norm(config)
    divided = {column.weight: 0, column.bias: 0, row.weight: 1, row.bias: -1, embedding.weight: 0, norm.weight: -1}
    for parameter, dimension in divided.items():
        assert parameter_partition(parameter) == (dimension, 1)
    assert column.weight.shape == (12, 8) and row.weight.shape == (8, 12) and embedding.weight.shape == (10, 8)
    assert TensorParallelFactory(dtype=torch.bfloat16).column(2, 2).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["gelu", "swiglu", "geglu"])
def test_mlp_units_lie_as_they_are_documented(kind: str) -> None:
    """Gated: the gate and the value of unit i are rows 2i and 2i + 1."""
    mlp = MLP(ModelConfig(hidden=HIDDEN, mlp=kind, mlp_hidden=24, mlp_bias=True), TensorParallelFactory())
    filled(mlp)
    x = torch.randn(7, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    pre = F.linear(x, mlp.up.weight, mlp.up.bias)
    gate = F.silu(pre[..., 0::2]) if kind == "swiglu" else F.gelu(pre if kind == "gelu" else pre[..., 0::2], approximate="tanh")
    units = gate if kind == "gelu" else gate * pre[..., 1::2]
    torch.testing.assert_close(mlp(x), F.linear(units, mlp.down.weight, mlp.down.bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_mlp_divided_by_rows_sums_to_the_whole(kind: str, tensor: int) -> None:
    """What `tensor` ranks hold (rows of up, columns of down) are whole units: their outputs sum to the undivided one."""
    whole = MLP(ModelConfig(hidden=HIDDEN, mlp=kind, mlp_hidden=24, mlp_bias=True), TensorParallelFactory())
    filled(whole)
    x = torch.randn(7, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    total = whole.down.bias.expand(7, 3, HIDDEN)
    for rank in range(tensor):
        part = MLP(ModelConfig(hidden=HIDDEN, mlp=kind, mlp_hidden=24 // tensor, mlp_bias=True), TensorParallelFactory())
        with torch.no_grad():
            part.up.weight.copy_(whole.up.weight.chunk(tensor, 0)[rank])
            part.up.bias.copy_(whole.up.bias.chunk(tensor, 0)[rank])
            part.down.weight.copy_(whole.down.weight.chunk(tensor, 1)[rank])
            part.down.bias.zero_()
        total = total + part(x)
    torch.testing.assert_close(total, whole(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tensor", [2, 4])
def test_attention_divided_by_rows_keeps_heads_together(tensor: int) -> None:
    """Rows r of the query and key/value weights yield the r-th share of the query heads and of the kv heads they read."""
    attention = Attention(ModelConfig(hidden=64, heads=8, key_value_heads=4), TensorParallelFactory(), 0)
    filled(attention)
    x = torch.randn(6, 2, 64, generator=torch.Generator().manual_seed(1))
    whole = attention.project(x, x)
    weights = attention.query.weight, attention.key_value.weight
    for rank in range(tensor):
        attention.query.weight, attention.key_value.weight = (nn.Parameter(weight.chunk(tensor)[rank]) for weight in weights)
        for part, expected in zip(attention.project(x, x), whole, strict=True):
            torch.testing.assert_close(part, expected.chunk(tensor, 2)[rank], rtol=1e-5, atol=1e-5)


# -- Padding of the vocabulary, and what the undivided parameter was ------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 8, 128])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_vocabulary_is_padded_to_the_least_equal_shares(tensor: int, multiple: int) -> None:
    factory = TensorParallelFactory(vocabulary_multiple=multiple)
    factory.tensor = tensor
    for vocabulary in (1, 2, 258, 1023, 1024, 50_258):
        padded = factory.padded(vocabulary)
        assert padded % tensor == 0 and padded // tensor % multiple == 0, "each rank the same number, a multiple"
        assert vocabulary <= padded < vocabulary + tensor * multiple, "and no more than needed"


@pytest.mark.parametrize("multiple", [1, 8, 128])
def test_padding_is_known_and_is_not_part_of_the_parameter(multiple: int) -> None:
    """What is padded by rows says how many are real, and the full shape (which names it in checkpoints) is without padding."""
    factory = TensorParallelFactory(vocabulary_multiple=multiple)
    weight, bias = factory.head(8, 11, bias=True)
    assert bias is not None
    embedding = factory.embedding(11, 8).weight
    for parameter, shape in ((embedding, (11, 8)), (weight, (11, 8)), (bias, (11,))):
        assert parameter.shape[0] == factory.padded(11) and parameter.real_rows == 11
        assert full_shape(parameter, 1) == (shape, 0)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_full_shape_is_that_of_all_parts(tensor: int) -> None:
    """From what one rank holds: divided dimensions times the ranks, others as they are, real rows where ids are padded."""
    factory = TensorParallelFactory()
    parts = {
        factory.column(6, 12).weight: ((12 * tensor, 6), 0),
        factory.column(6, 12, bias=True).bias: ((12 * tensor,), 0),
        factory.row(12, 6).weight: ((6, 12 * tensor), 1),
        factory.row(12, 6, bias=True).bias: ((6,), -1),
        Norm(ModelConfig(hidden=6)).weight: ((6,), -1),
        SharedKeyValue(6, 1, 2, factory).weight: ((4, 6), -1),
    }
    for parameter, expected in parts.items():
        assert full_shape(parameter, tensor) == expected
    embedding = factory.embedding(5, 6).weight
    embedding.real_rows = 5 * tensor - 3  # of 5 rows on each rank
    assert full_shape(embedding, tensor) == ((5 * tensor - 3, 6), 0)


@pytest.mark.parametrize(("tensor", "kv_heads"), [(2, 1), (4, 1), (4, 2), (8, 2)])
def test_shared_key_value_heads_are_those_that_the_query_heads_read(tensor: int, kv_heads: int) -> None:
    """More tensor ranks than key/value heads: rank r's query heads r H/R ... read head (their index) // (H / kv_heads)."""
    heads, head_size, hidden = 8, 3, 10
    factory, x = TensorParallelFactory(), torch.randn(4, 2, hidden, generator=torch.Generator().manual_seed(1))
    whole = factory.key_value(hidden, kv_heads, head_size)
    filled(whole)
    all_heads = whole(x).unflatten(-1, (kv_heads, 2, head_size))
    factory.tensor = tensor
    for rank in range(tensor):
        factory.tensor_rank = rank
        shared = factory.key_value(hidden, kv_heads, head_size)
        assert isinstance(shared, SharedKeyValue) and shared.weight.shape == whole.weight.shape
        shared.weight.data.copy_(whole.weight.data)
        mine = shared(x).unflatten(-1, (1, 2, head_size))[..., 0, :, :]
        for head in range(rank * heads // tensor, (rank + 1) * heads // tensor):
            torch.testing.assert_close(mine, all_heads[..., head // (heads // kv_heads), :, :])
