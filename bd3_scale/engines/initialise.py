"""Initial weights as a function of (seed, canonical name): the same on every layout, rank by rank.

Matrices are drawn in strips of rows, each from a generator of its own, so that a rank that holds some of the rows
draws only those: no rank needs the whole of a parameter to have its part of it (`fill`). Norms start at 1, biases and
adaLN modulations at 0 (a layer starts unconditioned), projections back into the residual stream are scaled by
1 / sqrt(2 layers).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from bd3_scale.checkpoint.region import Region
from bd3_scale.model.layers import full_shape
from bd3_scale.recipe.schema import ModelConfig

STRIP = 1024
"""Rows drawn at a time."""


def initial_rows(name: str, shape: torch.Size, config: ModelConfig, seed: int, first: int, last: int) -> Tensor:
    """fp32 rows [first, last) of the full (undivided) parameter `name` of `shape`."""
    rows = torch.Size([last - first, *shape[1:]])
    if name.endswith("bias") or "modulation" in name:
        return torch.zeros(rows)
    if "norm" in name.split(".")[-2]:
        return torch.ones(rows)
    std = config.initial_std
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * config.layers)
    strips = []
    for strip in range(first // STRIP, -(-last // STRIP)):
        begin, end = strip * STRIP, min((strip + 1) * STRIP, shape[0])
        digest = hashlib.blake2b(f"{seed}/{name}/{strip}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        drawn = torch.empty(end - begin, *shape[1:]).normal_(0.0, std, generator=generator)
        strips.append(drawn[max(first - begin, 0) : min(last, end) - begin])
    return torch.cat(strips)


@torch.no_grad()
def fill(values: Tensor, name: str, region: Region, config: ModelConfig, seed: int) -> None:
    """The initial values of `region` of the parameter `name` into `values` (1-D, on any device), strip by strip: however large
    the parameter is, only what the region touches is drawn, and no more than a strip of it exists beside."""
    shape = torch.Size(region.shape)
    width = math.prod(shape[1:]) // (shape[region.dim] if region.dim else 1) * (region.size if region.dim else 1)
    before = region.offset if region.dim == 0 else 0
    row, end = region.start // width + before, -(-region.stop // width) + before
    while row < end:
        last = min((row // STRIP + 1) * STRIP, end)
        drawn = initial_rows(name, shape, config, seed, row, last)
        flat = (drawn.narrow(region.dim, region.offset, region.size) if region.dim else drawn).reshape(-1)
        first = (row - before) * width
        start, stop = max(region.start, first), min(region.stop, first + len(flat))
        values[start - region.start : stop - region.start] = flat[start - first : stop - first]
        row = last


@torch.no_grad()
def initialise(model: torch.nn.Module, config: ModelConfig, seed: int, tensor_rank: int = 0, tensor: int = 1) -> None:
    """Fill all parameters of this tensor rank in place; rows that pad the vocabulary are zeros."""
    for name, parameter in model.named_parameters():
        shape, dimension = full_shape(parameter, tensor)
        held = parameter.shape[max(dimension, 0)]
        first = tensor_rank * held if dimension >= 0 else 0
        size = min(held, shape[max(dimension, 0)] - first)
        parameter.zero_()
        if size > 0:
            region = Region.divided(shape, max(dimension, 0), first, size)
            fill(parameter.view(-1)[: region.numel], name, region, config, seed)
