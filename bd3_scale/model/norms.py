"""The norms: of hidden states, of every head by itself, of all heads together.

All are computed in fp32. What tensor ranks divide is a norm over all heads, and it alone needs them: they exchange one number of each row,
forwards and backwards. Invariant: on every layout values and gradients are those of one process (`costs/parameter_shapes.py` says whose
gradients are known in part).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_scale.megatron_core import (
    copy_to_tensor_model_parallel_region,
    parallel_state,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from bd3_scale.model.layers import TensorParallelFactory
from bd3_scale.recipe.schema import ModelConfig


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the hidden size, computed in fp32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden))
        self.bias = nn.Parameter(torch.empty(config.hidden)) if config.norm_bias else None
        self.rms, self.epsilon = config.norm == "rmsnorm", config.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        shape, weight = self.weight.shape, self.weight.float()
        if self.rms:
            return F.rms_norm(x.float(), shape, weight, self.epsilon).to(x.dtype)
        return F.layer_norm(x.float(), shape, weight, None if self.bias is None else self.bias.float(), self.epsilon).to(x.dtype)


class HeadNorm(nn.Module):
    """RMSNorm over the last dimension of x [rows, batch, heads of this rank, d], computed in fp32, one weight for all heads.

    The weight's gradient on a tensor rank is that of the rank's heads: whoever trains must sum it over the tensor ranks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.head_size))
        self.epsilon = config.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.epsilon).to(x.dtype)


class AllHeadsNorm(nn.Module):
    """RMSNorm over all heads together: x [rows, batch, heads of this rank, d], computed in fp32, a weight for each of `heads` x d.

    A rank has the weights of its heads; where it shares its only one (`SharedKeyValue`) it holds all, and knows the gradient in part.
    """

    def __init__(self, heads: int, config: ModelConfig, factory: TensorParallelFactory) -> None:
        super().__init__()
        self.tensor, self.epsilon, size = factory.tensor, config.norm_epsilon, config.head_size
        if heads % factory.tensor:
            self.weight = nn.Parameter(torch.empty(heads * size))
            head = factory.tensor_rank * heads // factory.tensor
            self.mine = slice(head * size, (head + 1) * size)
        else:
            self.weight = nn.Parameter(torch.empty(heads * size // factory.tensor))
            set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
            self.mine = slice(None)

    def forward(self, x: Tensor) -> Tensor:
        weight, row = self.weight[self.mine].float(), x.float().flatten(-2)
        if self.tensor == 1:
            return F.rms_norm(row, weight.shape, weight, self.epsilon).to(x.dtype).unflatten(-1, x.shape[-2:])
        # Ranks have equally many heads, and those that are shared are shared by equally many: the mean of their means is that of all. The
        # heads of each rank have a gradient for it, so that it is summed backwards, too. Flat, because megatron-core's sum forgets what is
        # not contiguous.
        group = parallel_state.get_tensor_model_parallel_group()  # by name, as in `selected`
        means = reduce_from_tensor_model_parallel_region(row.square().mean(-1).flatten(), group=group)
        mean = copy_to_tensor_model_parallel_region(means / self.tensor, group=group).unflatten(0, row.shape[:-1])
        return (row * torch.rsqrt(mean + self.epsilon)[..., None] * weight).to(x.dtype).unflatten(-1, x.shape[-2:])
