"""What surrounds the layers: torch.compile, whole or not at all, and activation checkpointing.

What Dynamo cannot trace it leaves out without a word, and a function that it has compiled `recompile_limit` times (8) it runs as
plain Python from then on; FlexAttention then holds the whole matrix of scores. Both are errors here: a layer is one graph, from its
first norm to its last residual, and the limit is beyond what a run needs (patterns x last layer or not x training or validation x
sizes of a micro-batch), so that whoever meets it has found a fault.

Inductor's sums over rows and columns at once (`mix_order_reduction`) are switched off: where several gradients make one tensor, as those
of a modulation do, some are never written (pytorch issue 193061; on an H200 the last layer's were nan from 6,827 selected rows of
width 768 on). It is an option of each compilation, because settings of torch are a thread's own, and backwards are compiled in others.

Invariant: whatever differs from layer to layer or from step to step reaches compiled code as a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COMPILE_MODES = {"blocks": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""torch's name of what `training.compile` says. No CUDA graphs: they hold addresses, which micro-batches under way, recomputation and
ZeRO 3 change."""
BACKEND = "inductor"
"""torch.compile's."""
VARIANTS = 256
"""Of one function, for all layers together."""
_limited = threading.local()


def compiled_whole(function: Callable[..., Any], mode: str = "default", backend: str | None = None) -> Callable[..., Any]:
    """`function` as one graph; sizes are constants but for those that `of_any_size` marks. Raises where it cannot be one graph."""
    backend = backend or BACKEND
    options = None
    if backend == "inductor":
        options = {**torch._inductor.list_mode_options(mode), "triton.mix_order_reduction": False}
    compiled: Callable[..., Any] = torch.compile(function, options=options, backend=backend, dynamic=False, fullgraph=True)

    def run(*arguments: Any, **named: Any) -> Any:
        _limit_variants()
        return compiled(*arguments, **named)

    return run


def _limit_variants() -> None:
    """In this thread: a recomputation runs in the backward's."""
    if getattr(_limited, "count", None) != VARIANTS:
        torch._dynamo.config.recompile_limit = VARIANTS
        torch._dynamo.config.accumulated_recompile_limit = 16 * VARIANTS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        _limited.count = VARIANTS


def of_any_size(tensor: torch.Tensor, dimension: int) -> torch.Tensor:
    """The tensor, of whose size in `dimension` compiled code makes no variant of its own."""
    if not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    return tensor


RECOMPUTED = {"attention": "attention_half", "mlp": "mlp_half", "layer": "forward"}
"""`training.recompute` -> the method of a block whose inputs alone are kept."""


def wrap_blocks(blocks: Iterable[nn.Module], *, recompute: str, compile: str, backend: str | None = None) -> None:
    """Compile each layer, then recompute it in the backward (activation checkpointing). (Tensor before, ZeRO after.)

    Compiled code is recomputed whole, by running it again: inside of it the compiler would choose what is kept. It is methods that
    are compiled, not modules, so that an engine's hooks around a layer stay outside. `backend`: as in `compiled_whole`.
    """
    parts = ("attention_half", "mlp_half") if recompute in ("attention", "mlp") else ("forward",)
    for block in blocks:
        for part in parts:
            method = getattr(block, part)
            if compile != "none":
                method = compiled_whole(method, COMPILE_MODES[compile], backend)
            setattr(block, part, _recomputed(method) if RECOMPUTED.get(recompute) == part else method)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        # Dropout is keyed, not drawn: a recomputation needs no generator state.
        return torch.utils.checkpoint.checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return run
