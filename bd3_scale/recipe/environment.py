"""What `auto` stands for on this machine and on a kind of device."""

from __future__ import annotations

import getpass
import locale
import os
import sys

from bd3_scale.errors import RecipeError
from bd3_scale.recipe.schema import ParallelConfig, TrainingConfig


def settle() -> None:
    """See to what libraries take for granted of a process, before they are imported: that text is UTF-8, and that its user has a name (a
    container may give it a number that no passwd entry has). Raises RecipeError."""
    if not sys.flags.utf8_mode and locale.getencoding().lower().replace("-", "") != "utf8":
        raise RecipeError(f"this process reads text as {locale.getencoding()}, and torch cannot; set PYTHONUTF8=1, or LC_ALL=C.UTF-8")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"


def resolve_precision(training: TrainingConfig, device: str) -> str:
    """fp32 or bf16 for `auto`: bf16 on CUDA, fp32 on CPU."""
    if training.precision != "auto":
        return training.precision
    return "bf16" if device == "cuda" else "fp32"


def resolve_attention(kernel: str, device: str) -> str:
    """The kernel of attention for `auto`: flex on CUDA, tiled elsewhere."""
    if kernel != "auto":
        return kernel
    return "flex" if device == "cuda" else "tiled"


def resolve_device(requested: str, key: str = "run.device") -> str:
    """cpu or cuda for `auto`. Raises RecipeError, which names `key`, where CUDA is requested and not there."""
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"{key} is cuda, but torch finds no CUDA device here; set {key}=cpu or install a CUDA build of torch")
    return requested if requested != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def compiled_in_pieces(training: TrainingConfig, parallel: ParallelConfig) -> bool:
    """Whether layers would be compiled whose weights DeepSpeed gathers linear by linear: its hooks cut a layer at each of them."""
    return training.compile != "none" and parallel.zero == 3 and parallel.resolved_engine == "deepspeed"
