"""The parts of a layer: megatron-core's tensor-parallel linears and embedding, norms, MLPs, conditioning, dropout.

The linears come from a `Linears` factory, which holds the tensor-parallel group: the modules here read like
single-device code and are divided by whoever makes the factory. Every weight is made empty; `initialise.py` fills it
as a function of (seed, canonical name), so that the values do not depend on the layout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from bd3_scale.diffusion.noise import hash32
from bd3_scale.model.config import ModelConfig


class ColumnLinear(ColumnParallelLinear):
    """x [..., in] -> [..., out / tensor]; the weight is divided by rows. megatron-core's, returning the output alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """x [..., in / tensor] -> [..., out], summed over the tensor ranks; the weight is divided by columns."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class Linears:
    """Makes the linears and the embedding of a model for one tensor-parallel group of megatron.core.parallel_state."""

    def __init__(self, tensor: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.tensor = tensor
        # Weights are filled later and moved to the device as a whole: they are always made on the host.
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=tensor,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=dtype,
            gradient_accumulation_fusion=False,
        )

    def column(self, inputs: int, outputs: int, bias: bool = False) -> ColumnLinear:
        linear = ColumnLinear(inputs, outputs, config=self.config, init_method=_unused, bias=bias)
        set_tensor_model_parallel_attributes(linear.weight, True, 0, 1)
        return linear

    def row(self, inputs: int, outputs: int, bias: bool = False) -> RowLinear:
        linear = RowLinear(inputs, outputs, config=self.config, init_method=_unused, bias=bias, input_is_parallel=True, skip_bias_add=False)
        set_tensor_model_parallel_attributes(linear.weight, True, 1, 1)
        return linear

    def embedding(self, vocabulary: int, hidden: int) -> VocabParallelEmbedding:
        embedding = VocabParallelEmbedding(vocabulary, hidden, config=self.config, init_method=_unused)
        set_tensor_model_parallel_attributes(embedding.weight, True, 0, 1)
        return embedding


def _unused(weight: Tensor) -> None:
    raise AssertionError("weights are filled by bd3_scale.model.initialise")


class Norm(nn.Module):
    """LayerNorm (weight, no bias) or RMSNorm, computed in fp32, eps 1e-5."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden))
        self.rms = config.norm == "rmsnorm"

    def forward(self, x: Tensor) -> Tensor:
        shape, weight = self.weight.shape, self.weight.float()
        if self.rms:
            return F.rms_norm(x.float(), shape, weight, 1e-5).to(x.dtype)
        return F.layer_norm(x.float(), shape, weight, None, 1e-5).to(x.dtype)


class MLP(nn.Module):
    """GELU (tanh form) or SwiGLU, with the gate and the value of one hidden unit side by side in the fused weight."""

    def __init__(self, config: ModelConfig, linears: Linears) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.up = linears.column(config.hidden, config.mlp_size * (2 if self.gated else 1), bias=config.mlp_bias)
        self.down = linears.row(config.mlp_size, config.hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            # Interleaved, so that dividing the weight by rows keeps every pair on one rank, at any tensor size.
            gate, value = x.unflatten(-1, (-1, 2)).unbind(-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(x, approximate="tanh"))


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


class NoiseCondition(nn.Module):
    """sigma [...] -> condition [..., conditioning_size]: 256 sinusoids (cos, then sin; period 10,000), two linears, SiLU."""

    frequencies = 256

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.conditioning_size
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, sigma: Tensor) -> Tensor:
        half = self.frequencies // 2
        rate = torch.exp(torch.arange(half, device=sigma.device, dtype=torch.float32) * (-math.log(10000.0) / half))
        angle = sigma.float()[..., None] * rate
        waves = torch.cat([angle.cos(), angle.sin()], -1)
        return F.silu(self.mlp(waves.to(next(self.mlp.parameters()).dtype)))


class KeyedDropout(nn.Module):
    """Dropout whose mask is a pure function of (key of the sample, place in the network, row, channel).

    No generator has a state: the mask does not depend on the rank, the micro-batch or on whether the forward is a
    recomputation. x is [rows, batch, hidden]; `keys` int64 [batch] in [0, 2^32). Elementwise integer hashing (a
    32-bit finaliser with full avalanche) that torch.compile fuses into its neighbours.
    """

    def __init__(self, probability: float, place: int) -> None:
        super().__init__()
        self.probability, self.place = probability, place

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        rows, _, hidden = x.shape
        row = torch.arange(rows, device=x.device)[:, None, None]
        channel = torch.arange(hidden, device=x.device)
        key = hash32(keys + self.place * 0x9E3779B9)[None, :, None]
        word = hash32(hash32(key + row * 0x85EBCA6B) + channel * 0xC2B2AE35)
        kept = word >= int(self.probability * 2**32)
        return torch.where(kept, x / (1.0 - self.probability), torch.zeros((), dtype=x.dtype, device=x.device))


def parameter_partition(parameter: Any) -> tuple[int, int]:
    """(dimension along which megatron-core divides it, stride); dimension -1: held whole by every tensor rank."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return -1, 1
    return parameter.partition_dim, parameter.partition_stride
