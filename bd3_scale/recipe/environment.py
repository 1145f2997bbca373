"""What `auto` stands for on this machine, and what a launcher tells this process. Whoever has a `Layout` asks that instead."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from bd3_scale.errors import RecipeError
from bd3_scale.recipe.schema import Recipe


def resolve_precision(recipe: Recipe, device: str) -> str:
    """fp32 or bf16 for `auto`: bf16 on CUDA, fp32 on CPU."""
    if recipe.training.precision != "auto":
        return recipe.training.precision
    return "bf16" if device == "cuda" else "fp32"


def resolve_attention(kernel: str, device: str) -> str:
    """The kernel of attention for `auto`: flex on CUDA, tiled elsewhere."""
    if kernel != "auto":
        return kernel
    return "flex" if device == "cuda" else "tiled"


def resolve_device(recipe: Recipe) -> str:
    """cpu or cuda for `auto`. Raises RecipeError where CUDA is asked for and not there."""
    import torch

    if recipe.run.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("run.device is cuda, but torch finds no CUDA device here; set run.device=cpu or install a CUDA build of torch")
    return recipe.run.device if recipe.run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Launched:
    """This process as torchrun, or srun through torchrun, started it; alone without a launcher."""

    rank: int
    world_size: int
    local_rank: int
    """Among the ranks of this host."""
    local_world_size: int
    numbered: bool
    """Whether somebody gave this process its rank; else it is alone and needs no place to meet others."""

    def ranks_of_this_host(self, rank: int) -> range:
        """The ranks that the launcher started beside `rank` here, as far as it says so."""
        first = rank - self.local_rank
        return range(first, first + self.local_world_size) if self.local_rank < self.local_world_size else range(rank, rank + 1)


def launched(environment: Mapping[str, str] = os.environ) -> Launched:
    """The only reader of the launcher's variables."""
    rank, local_rank = (int(environment.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    world_size, local_world_size = (int(environment.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return Launched(rank, world_size, local_rank, local_world_size, "RANK" in environment)


def world_size_of_environment() -> int:
    """Ranks that were started; 1 without a launcher."""
    return launched().world_size
