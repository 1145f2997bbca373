"""What `auto` stands for on a kind of device."""

from __future__ import annotations

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
