"""The parts of a layer: megatron-core's tensor-parallel linears and embedding, MLPs, conditioning, dropout.

The linears come from a `TensorParallelFactory` factory, which holds the tensor-parallel group: the modules here read like
single-device code and are divided by whoever makes the factory. Every weight is made empty; `engines/initialise.py` fills it
as a function of (seed, canonical name), so that the values do not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.costs.sizes import SINUSOIDS, padded_vocabulary
from bd3_scale.distributed.sequence_shards import Stream
from bd3_scale.keyed_random import hash32
from bd3_scale.megatron_core import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    parallel_state,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from bd3_scale.model.simplex_embedding import SMALLEST, expected_embedding
from bd3_scale.objectives.simplex import SimplexNoise
from bd3_scale.recipe.schema import ModelConfig


class _Traceable:
    """The product of megatron-core's linears, and what it can be in compiled code.

    megatron-core begins collectives of the backward in one place and awaits them in another, around the products, which Dynamo cannot
    trace. In compiled code they are steps of the graph, which the compiler orders, and the product is a plain one. So it is where an
    undivided network samples: to prepare for a backward takes the host longer than the product of a few rows takes the device.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, **named: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            return super()._forward_impl(input=input, weight=weight, **named)  # type: ignore[misc, no-any-return]
        if named["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=named["tp_group"])
        elif named["allreduce_dgrad"]:
            # Of a copy, which the compiler fuses: Dynamo refuses an input of the layer that is a view, handed through as it is.
            input = copy_to_tensor_model_parallel_region(input.clone(), group=named["tp_group"])
        return F.linear(input, weight, named["bias"])

    def _samples_alone(self: Any) -> bool:
        # Compiled code, which trains, cannot ask for the mode.
        return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and self.config.tensor_model_parallel_size == 1

    def _plain(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ColumnLinear(_Traceable, ColumnParallelLinear):
    """x [..., in] -> [..., out / tensor]; the weight is divided by rows. megatron-core's, returning the output alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self._plain(x) if self._samples_alone() else super().forward(x)[0]


class RowLinear(_Traceable, RowParallelLinear):
    """x [..., in / tensor] -> [..., out], summed over the tensor ranks; the weight is divided by columns."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self._plain(x) if self._samples_alone() else super().forward(x)[0]


class Embedding(VocabParallelEmbedding):
    """tokens int64 [batch, rows] -> [rows, batch, hidden], of which a rank gets its part where rows are divided.

    With `noise` [batch, n] the first n columns are words that are noised (see `simplex`): their expected embeddings come first, and
    a rank's part is its part of them and its part of the others, as `sequence_shards.py` has it.
    """

    words: int
    """Ids that can be a word: all before MASK."""

    def forward(self, tokens: Tensor, noise: SimplexNoise | None = None) -> Tensor:  # type: ignore[override]
        if noise is not None:
            noisy, rest = tokens.tensor_split([noise.keys.shape[1]], dim=1)
            expected = self._expected(noisy, noise)
            return torch.cat([expected, self.forward(rest)]) if rest.shape[1] else expected
        # megatron-core's turns batch and rows itself, but only on its way to dividing the rows.
        return super().forward(tokens if self.reduce_scatter_embeddings else tokens.t())

    def _expected(self, tokens: Tensor, noise: SimplexNoise) -> Tensor:
        first = self.vocab_start_index
        mean, total = expected_embedding(self.weight, tokens, noise, first, min(self.vocab_end_index, self.words))
        if self.tp_group.size() > 1:
            whole = total.clone()
            dist.all_reduce(whole, group=self.tp_group)
            mean = (mean.float() * (total / whole.clamp_min(SMALLEST))[:, None]).to(mean.dtype)
        rows = mean.unflatten(0, tokens.shape).transpose(0, 1).contiguous()
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class SharedKeyValue(nn.Module):
    """Key and value projection where there are more tensor ranks than key/value heads: each rank holds the whole weight and
    computes the one head that its query heads read. x [rows, batch, hidden] -> [all rows, batch, 2 d].

    The gradient of weight and bias on a rank is the part of that rank: whoever trains must sum it over the tensor ranks.
    """

    def __init__(self, hidden: int, kv_heads: int, head_size: int, factory: TensorParallelFactory, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * kv_heads * head_size, hidden, dtype=factory.config.params_dtype))
        self.bias = nn.Parameter(torch.empty(2 * kv_heads * head_size, dtype=factory.config.params_dtype)) if bias else None
        self.sequence = factory.sequence
        head = factory.tensor_rank * kv_heads // factory.tensor
        self.mine = slice(head * 2 * head_size, (head + 1) * 2 * head_size)

    def forward(self, x: Tensor) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()  # by name, as in `selected`
        x = gather_from_sequence_parallel_region(x, group=group) if self.sequence else copy_to_tensor_model_parallel_region(x, group=group)
        return F.linear(x, self.weight[self.mine], None if self.bias is None else self.bias[self.mine])


class TensorParallelFactory:
    """Makes the linears and the embedding of a model for one tensor-parallel group of megatron.core.parallel_state.

    `sequence`: between the linears each rank holds its part of the rows (see `sequence_shards.py`). `vocabulary_multiple`: ids per
    rank are padded to a multiple of it, for the matrix units of a GPU; padded ids can neither be looked up nor win.
    """

    def __init__(
        self, tensor: int = 1, dtype: torch.dtype = torch.float32, *, sequence: bool = False, vocabulary_multiple: int = 1
    ) -> None:
        self.tensor, self.sequence, self.vocabulary_multiple = tensor, sequence, vocabulary_multiple
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank() if tensor > 1 else 0
        # Weights are filled later and moved to the device as a whole: they are always made on the host.
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=tensor,
            sequence_parallel=sequence,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=dtype,
            gradient_accumulation_fusion=False,
        )

    def column(self, inputs: int, outputs: int, bias: bool = False) -> ColumnLinear:
        linear = ColumnLinear(inputs, outputs, config=self.config, init_method=_unused, bias=bias, gather_output=False)
        set_tensor_model_parallel_attributes(linear.weight, True, 0, 1)
        return linear

    def row(self, inputs: int, outputs: int, bias: bool = False) -> RowLinear:
        linear = RowLinear(inputs, outputs, config=self.config, init_method=_unused, bias=bias, input_is_parallel=True, skip_bias_add=False)
        set_tensor_model_parallel_attributes(linear.weight, True, 1, 1)
        return linear

    def key_value(self, hidden: int, kv_heads: int, head_size: int, bias: bool = False) -> nn.Module:
        """Key and value of grouped heads: divided while there is a head for every rank, otherwise shared."""
        if kv_heads % self.tensor == 0:
            return self.column(hidden, 2 * kv_heads * head_size, bias)
        return SharedKeyValue(hidden, kv_heads, head_size, self, bias)

    def embedding(self, vocabulary: int, hidden: int) -> Embedding:
        embedding = Embedding(
            self.padded(vocabulary), hidden, config=self.config, init_method=_unused, reduce_scatter_embeddings=self.sequence
        )
        set_tensor_model_parallel_attributes(embedding.weight, True, 0, 1)
        embedding.weight.real_rows = vocabulary
        embedding.words = vocabulary - 1
        return embedding

    def head(self, hidden: int, vocabulary: int, bias: bool) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight [padded V / tensor, hidden] and bias of an output layer; the caller multiplies."""
        linear = self.column(hidden, self.padded(vocabulary), bias=bias)
        for parameter in linear.parameters():
            parameter.real_rows = vocabulary
        return linear.weight, linear.bias

    def padded(self, vocabulary: int) -> int:
        """Ids with padding, of all ranks."""
        return padded_vocabulary(vocabulary, self.tensor, self.vocabulary_multiple)

    def stream(self, pattern: AttentionPattern) -> Stream:
        """Which rows this rank holds between the linears."""
        return Stream(pattern, self.tensor, self.tensor_rank) if self.sequence else Stream(pattern)

    def shared_by_rows(self, x: Tensor) -> Tensor:
        """Put a vector that all rows use before them: where rows are divided, its gradient is summed over the ranks."""
        return copy_to_tensor_model_parallel_region(x) if self.sequence else x

    def all_rows(self, x: Tensor) -> Tensor:
        """The rows of all ranks, for work that every rank does alike."""
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False) if self.sequence else x

    def before_head(self, x: Tensor) -> Tensor:
        """Put the input of the head: each rank's gradient is that of its part of the vocabulary, and they are summed."""
        return copy_to_tensor_model_parallel_region(x) if self.tensor > 1 else x

    def whole_logits(self, logits: Tensor) -> Tensor:
        """[n, padded V / tensor] of each rank -> [n, padded V] on every rank."""
        return gather_from_tensor_model_parallel_region(logits) if self.tensor > 1 else logits


def _unused(weight: Tensor) -> None:
    raise AssertionError("weights are filled by bd3_scale.engines.initialise")


class LearnedPositions(nn.Module):
    """A vector per position id, added to the embedded rows: x [rows, batch, hidden], positions int64 [rows] or [batch, rows] below the
    context."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.context, config.hidden))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + F.embedding(positions[:, None] if positions.dim() == 1 else positions.t(), self.weight).to(x.dtype)


class MLP(nn.Module):
    """GELU (tanh form), SwiGLU or GEGLU, with the gate and the value of one hidden unit side by side in the fused weight."""

    def __init__(self, config: ModelConfig, factory: TensorParallelFactory) -> None:
        super().__init__()
        self.kind = config.mlp
        self.up = factory.column(config.hidden, config.mlp_size * (2 if config.gated else 1), bias=config.mlp_bias)
        self.down = factory.row(config.mlp_size, config.hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "gelu":
            return self.down(F.gelu(x, approximate="tanh"))
        # Interleaved, so that dividing the weight by rows keeps every pair on one rank, at any tensor size.
        gate, value = x.unflatten(-1, (-1, 2)).unbind(-1)
        return self.down((F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * value)


class Modulation(nn.Module):
    """adaLN (Peebles & Xie 2023, as in the paper's DiT): `count` chunks of width `hidden` from the condition vector."""

    def __init__(self, config: ModelConfig, count: int) -> None:
        super().__init__()
        self.count = count
        self.weight = nn.Parameter(torch.empty(count * config.hidden, config.conditioning_size))
        self.bias = nn.Parameter(torch.empty(count * config.hidden))

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return F.linear(condition, self.weight, self.bias).chunk(self.count, -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


@dataclass(frozen=True)
class RowGroups:
    """Rows that are conditioned alike: `size` neighbours each of the first `scored` rows, and all the others together."""

    scored: int
    size: int

    def apply(self, function: Callable[..., Tensor], rows: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
        """function(*rows, *vectors), group by group: rows [n, batch, hidden], vectors [groups + 1, batch, hidden] -> [n, batch, hidden].

        n is `scored`, or more. Vectors are not repeated for the rows of their group, so that a backward keeps no more than they are.
        """
        grouped = (x[: self.scored].unflatten(0, (-1, self.size)) for x in rows)
        noisy = function(*grouped, *(vector[:-1, None] for vector in vectors)).flatten(0, 1)
        if len(rows[0]) == self.scored:
            return noisy
        return torch.cat([noisy, function(*(x[self.scored :] for x in rows), *(vector[-1:] for vector in vectors))])


class NoiseCondition(nn.Module):
    """sigma [...] -> condition [..., conditioning_size]: sinusoids (cos, then sin; period 10,000), two linears, SiLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.conditioning_size
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, sigma: Tensor) -> Tensor:
        half = SINUSOIDS // 2
        rate = torch.exp(torch.arange(half, device=sigma.device, dtype=torch.float32) * (-math.log(10000.0) / half))
        angle = sigma.float()[..., None] * rate
        waves = torch.cat([angle.cos(), angle.sin()], -1)
        return F.silu(self.mlp(waves.to(next(self.mlp.parameters()).dtype)))


@dataclass(frozen=True)
class DropoutWords:
    """What the dropouts of one layer hash; all of it is made outside of the layer, as data, so that layers differ in nothing else."""

    keys: Tensor
    """int64 [2, batch] in [0, 2^32): of each sample at the layer's two places; or, of selected rows, [2, rows]."""
    rows: Tensor
    """int64 [at least rows]: which row of the undivided stream each is."""
    channels: Tensor
    """int64 [hidden] in [0, 2^32)."""


def dropout_keys(keys: Tensor, layers: range) -> Tensor:
    """Keys of samples, int64 [batch] in [0, 2^32) -> of every layer's two places, int64 [layers, 2, batch]."""
    places = torch.arange(2 * layers.start, 2 * layers.stop, device=keys.device) * 0x9E3779B9
    return hash32(keys + places[:, None]).unflatten(0, (-1, 2))


def dropout_channels(hidden: int, device: torch.device) -> Tensor:
    """int64 [hidden]: `DropoutWords.channels`. Inside of compiled code the index would be of 32 bits, and the product wrong."""
    return torch.arange(hidden, device=device) * 0xC2B2AE35 & 0xFFFFFFFF


class KeyedDropout(nn.Module):
    """Dropout whose mask is a pure function of (key of the sample, place in the network, row, channel).

    No generator has a state: the mask does not depend on the layout, the micro-batch or on whether the forward is a
    recomputation. x is [rows, batch, hidden], or selected rows [rows, hidden]. `place`: 0 or 1, which of its layer's two this is;
    the layer itself is in the keys. Elementwise integer hashing (a 32-bit finaliser with full avalanche) that torch.compile
    fuses into its neighbours.
    """

    def __init__(self, probability: float, place: int) -> None:
        super().__init__()
        self.probability, self.place = probability, place

    def forward(self, x: Tensor, words: DropoutWords | None) -> Tensor:
        """x itself without `words`, and where nothing is to be dropped."""
        if words is None or not self.training or self.probability == 0.0:
            return x
        row = words.rows[: len(x)].view(-1, *[1] * (x.dim() - 1))
        word = hash32(hash32(words.keys[self.place, :, None] + row * 0x85EBCA6B) + words.channels)
        kept = word >= int(self.probability * 2**32)
        return torch.where(kept, x / (1.0 - self.probability), torch.zeros((), dtype=x.dtype, device=x.device))


def parameter_partition(parameter: Any) -> tuple[int, int]:
    """(dimension along which megatron-core divides it, stride); dimension -1: held whole by every tensor rank."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return -1, 1
    return parameter.partition_dim, parameter.partition_stride


def full_shape(parameter: Any, tensor: int) -> tuple[tuple[int, ...], int]:
    """Shape of the undivided parameter, without the padding of the vocabulary, and the dimension that is divided (or -1)."""
    dimension, _ = parameter_partition(parameter)
    shape = [size * tensor if axis == dimension else size for axis, size in enumerate(parameter.shape)]
    shape[0] = getattr(parameter, "real_rows", shape[0])
    return tuple(shape), dimension
