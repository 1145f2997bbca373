"""DeepSpeed 0.19.8 without a look at the device: what its optimizers ask of a gradient norm is answered on the device.

DeepSpeed reads the norm on the host to see whether it is finite, and to see whether to clip: the host waits for the backward, once to
four times a step. Here a step is left out on the device (adamw.py), so that the first question has no need of an answer, and clipping
by a factor of 1 is no clipping. Where a norm is not finite DeepSpeed writes -1 into it, a number that it takes to the device and that
torch then reads. In the modules named below, and nowhere else, these functions are bound to ones that do not wait.

Invariants: the version is pinned, since names and what they are used for are those of one version; a norm that is not finite stays
recognisable (`norm_on_device`), whatever DeepSpeed writes in its place; a test counts the reads of every ZeRO stage.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bd3_scale.engines.engine import clip

VERSION = "0.19.8"
JUDGING = ("bf16_optimizer", "zero.stage_1_and_2", "zero.stage3")
"""Modules that make no step where `is_invalid_grad_norm`."""
MARKING = ("utils", "zero.stage_1_and_2", "zero.stage3")
"""Modules that mark a norm which is not finite by `mask_nan_or_inf_with_val_inplace`."""


def install() -> None:
    """Bind them; harmless when repeated. Raises RuntimeError for another version of DeepSpeed."""
    import deepspeed

    if deepspeed.__version__.split("+")[0] != VERSION:
        raise RuntimeError(f"DeepSpeed {deepspeed.__version__} is installed, but this version of bd3_scale needs {VERSION}: pip install .")
    modules: dict[str, Any] = {name: importlib.import_module(f"deepspeed.runtime.{name}") for name in (*JUDGING, *MARKING)}
    for name in JUDGING:
        assert callable(modules[name].is_invalid_grad_norm)
        modules[name].is_invalid_grad_norm = _left_to_the_step_rule
    for name in MARKING:
        assert callable(modules[name].mask_nan_or_inf_with_val_inplace)
        modules[name].mask_nan_or_inf_with_val_inplace = _mark
    assert callable(modules["bf16_optimizer"].clip_tensors_by_global_norm)
    modules["bf16_optimizer"].clip_tensors_by_global_norm = _clip


def norm_on_device(found: Tensor | float, device: torch.device) -> Tensor:
    """DeepSpeed's global gradient norm as a fp32 scalar on the device, also where it answers a number of Python; -1, its word for one
    that is not finite, as infinity."""
    # A number is written there by a kernel; to copy it would be to wait.
    norm = found.to(device, torch.float32) if isinstance(found, Tensor) else torch.full((), found, dtype=torch.float32, device=device)
    return norm.masked_fill(norm < 0, torch.inf)


def _left_to_the_step_rule(norm: Any) -> bool:
    return False


def _mark(input: Tensor, device: Any = None, val: float = -1.0) -> None:
    input.masked_fill_(~torch.isfinite(input), val)


def _clip(input_tensors: Sequence[Tensor], max_norm: float, global_norm: Tensor, mpu: Any = None) -> Tensor:
    clip(input_tensors, global_norm, max_norm)
    return global_norm
