"""The one place that makes megatron-core 0.16.1 run on CPU and gloo; never used on CUDA.

megatron-core allocates its communication buffers on "the current CUDA device" and names devices "cuda" in a few places.
Inside the modules listed here, and nowhere else, the name `torch` is bound to a view of torch in which that device is
the CPU. Nothing is computed differently: the same linears, mappings, schedules, gradient buffers and distributed
optimizer run, so that what is tested on gloo is what runs on NCCL.

Invariants: torch itself is not touched; the version is pinned, since the list of modules is that of one version; on CUDA
`install` is never called (the caller decides by the run's device, not by what the machine has).
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bd3_scale import megatron_core

VERSION = "0.16.1"
MODULES = (
    "tensor_parallel.mappings",
    "tensor_parallel.layers",
    "utils",
    "pipeline_parallel.schedules",
    "pipeline_parallel.p2p_communication",
    "distributed.param_and_grad_buffer",
    "optimizer.optimizer",
    "optimizer.distrib_optimizer",
)
FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "empty_like", "zeros_like")


class _View(types.ModuleType):
    """A module that answers with another's names, except for those set on it."""

    def __init__(self, name: str, original: Any) -> None:
        super().__init__(name)
        self.__dict__["_original"] = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


def install() -> None:
    """Bind the view; harmless when repeated. Raises RuntimeError for another version of megatron-core."""
    if megatron_core.VERSION != VERSION:
        raise RuntimeError(f"megatron-core {megatron_core.VERSION} is installed, but CPU runs need {VERSION}: pip install .")
    view = _cpu_view()
    for name in MODULES:
        module: Any = importlib.import_module(f"megatron.core.{name}")
        if module.torch is torch:
            module.torch = view


def _cpu_view() -> types.ModuleType:
    cuda = _View("torch.cuda, seen from a CPU run", torch.cuda)
    cuda.current_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    cuda.synchronize = lambda *arguments, **named: None  # type: ignore[attr-defined]
    view = _View("torch, seen from a CPU run", torch)
    view.cuda = cuda  # type: ignore[attr-defined]
    for name in FACTORIES:
        setattr(view, name, _on_cpu(getattr(torch, name)))
    return view


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*arguments: Any, **named: Any) -> torch.Tensor:
        if "device" in named and torch.device(named["device"]).type == "cuda":
            named["device"] = torch.device("cpu")
        return factory(*arguments, **named)

    return make


def name_types_as_on_cuda(parameters: Iterable[torch.Tensor]) -> None:
    """megatron-core's optimizers ask a parameter's `type()` for the name of a CUDA type: let CPU parameters answer so."""
    names = {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}
    for parameter in parameters:
        parameter.type = lambda dtype=names[parameter.dtype]: dtype  # type: ignore[method-assign, assignment, misc]
