"""The processes of an evaluation: data-parallel replicas of the network, of tensor-parallel parts of it, or of context ranks.

Sampling makes one tensor-parallel group of all processes, because one text cannot be divided otherwise. An evaluation has
many rows: each process (or group of `tensor` of them) holds a network of its own and works on its share of the rows; or
`context` networks on the positions of each row, where rows are too long for one. Invariant: all ranks use one checkpoint,
also where a training moves `latest` while they look.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.checkpoint.store import locate
from bd3_scale.collective_errors import together
from bd3_scale.distributed import layout as layouts
from bd3_scale.distributed.layout import Layout
from bd3_scale.errors import RecipeError
from bd3_scale.generation.load_model import LoadedNetwork, check_tensor_ranks, device_of_process, load_network, read_recipe
from bd3_scale.launcher import launched
from bd3_scale.megatron_core import parallel_state
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.schema import ParallelConfig


def load_replicas(
    path: str | Path,
    *,
    tensor: int | None = None,
    context: int | None = None,
    weights: str = "auto",
    device: str = "auto",
    block_size: int | None = None,
) -> tuple[LoadedNetwork, Layout]:
    """The network of a checkpoint on every replica of `context` x `tensor` ranks, and where this rank stands; collective in the
    world.

    Joins the world that torchrun started, with `tensor` and `context` 1 if they are None, unless the caller has joined it. Raises
    what `load_network` raises, and RecipeError where the number of processes is no multiple of `tensor` x `context` or the network
    cannot be divided by `tensor`.
    """
    layout = _join(read_recipe(Checkpoint(locate(path))), tensor, context, device_of_process(device).type)
    # Others may have looked before or after `latest` was moved.
    found = together(layout, lambda: str(locate(path)), str)[0]
    return load_network(found, weights=weights, device=device, block_size=block_size, context=layout.context), layout


def _join(recipe: Recipe, tensor: int | None, context: int | None, device: str) -> Layout:
    if dist.is_initialized() and parallel_state.model_parallel_is_initialized():
        joined = ParallelConfig(
            tensor=parallel_state.get_tensor_model_parallel_world_size(), context=parallel_state.get_context_parallel_world_size()
        )
        for name, asked, has, what in (("tensor", tensor, joined.tensor, "networks"), ("context", context, joined.context, "rows")):
            if asked not in (None, has):
                raise RecipeError(f"{name} is {asked}, but the world that was joined divides {what} by {has}; set --{name} {has}")
        place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        return layouts.current(joined, place)
    world_size = dist.get_world_size() if dist.is_initialized() else launched().world_size
    tensor, context = (1 if asked is None else asked for asked in (tensor, context))
    if tensor < 1 or world_size % tensor:
        raise RecipeError(f"tensor is {tensor} but must divide the number of processes, {world_size}; set --tensor 1")
    if context < 1 or world_size // tensor % context:
        networks = f"{world_size}" if tensor == 1 else f"{world_size}, over tensor = {tensor}"
        raise RecipeError(f"context is {context} but must divide the number of processes, {networks}; set --context 1")
    check_tensor_ranks(recipe, tensor)
    return layouts.start(ParallelConfig(tensor=tensor, context=context, timeout=recipe.parallel.timeout), device)
