"""DeepSpeed 0.19.8 without a look at the device: what its optimizers ask of a gradient norm is answered on the device.

DeepSpeed reads the norm on the host to see whether it is finite, and to see whether to clip: the host waits for the backward, once to
four times a step. Here a step is left out on the device (adamw.py), so that the first question has no need of an answer, and clipping
by a factor of 1 is no clipping. In the modules named below, and nowhere else, these functions are bound to ones that do not read.

Invariants: the version is pinned, since names and what they are used for are those of one version; a norm that is not finite stays
recognisable (`norm_on_device`), whatever DeepSpeed writes in its place; a test counts the reads of every ZeRO stage.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bd3_scale.parallel.engine import clip

VERSION = "0.19.8"
JUDGING = ("bf16_optimizer", "zero.stage_1_and_2", "zero.stage3")
"""Modules that make no step where `is_invalid_grad_norm`."""


def install() -> None:
    """Bind them; harmless when repeated. Raises RuntimeError for another version of DeepSpeed."""
    import deepspeed

    if deepspeed.__version__.split("+")[0] != VERSION:
        raise RuntimeError(f"DeepSpeed {deepspeed.__version__} is installed, but this version of bd3_scale needs {VERSION}: pip install .")
    modules: dict[str, Any] = {name: importlib.import_module(f"deepspeed.runtime.{name}") for name in JUDGING}
    for module in modules.values():
        assert callable(module.is_invalid_grad_norm)
        module.is_invalid_grad_norm = _left_to_the_step_rule
    assert callable(modules["bf16_optimizer"].clip_tensors_by_global_norm)
    modules["bf16_optimizer"].clip_tensors_by_global_norm = _clip


def norm_on_device(found: Any) -> Tensor:
    """DeepSpeed's global gradient norm as a fp32 scalar; -1, its word for one that is not finite, as infinity."""
    norm = torch.as_tensor(found, dtype=torch.float32)
    return norm.masked_fill(norm < 0, torch.inf)


def _left_to_the_step_rule(norm: Any) -> bool:
    return False


def _clip(input_tensors: Sequence[Tensor], max_norm: float, global_norm: Tensor, mpu: Any = None) -> Tensor:
    clip(input_tensors, global_norm, max_norm)
    return global_norm
