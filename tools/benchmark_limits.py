"""What a device reaches of its limits: the numbers of `Reached` in bd3_scale/planning/devices.py, measured at a network's own shapes.

Products (each linear of a layer, and its two of the backward), a kernel that streams, attention forward and backward on the tiles that it
visits, the head's loss eager and fused. A share is one of the peak, or of the bandwidth, that the table of devices has for this device;
elsewhere (on CPU) rates alone are told. Invariant: FLOPs and bytes are those of `planning/limits.py`, so that a share can be put in its
place as it is.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from benchmark_measure import alternate
from megatron.core import parallel_state
from torch import Tensor

from bd3_scale.attention.kernels import attend
from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.costs.activation_memory import Batch
from bd3_scale.costs.sizes import VOCABULARY_MULTIPLE
from bd3_scale.distributed import layout
from bd3_scale.model.layers import TensorParallelFactory
from bd3_scale.model.loss_head import Head
from bd3_scale.planning.devices import DEVICES, Device
from bd3_scale.planning.limits import TILE, half_products, visited_tiles
from bd3_scale.recipe.schema import ModelConfig, ParallelConfig

VOCABULARY = 50258
LAUNCHES = 10
"""Of what is measured, one after the other: the host is ahead of the device then."""


def benchmark_limits(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    known = next((one for one in DEVICES.values() if one.reported and one.reported == name), None)
    config = ModelConfig(
        context=options.context, hidden=options.hidden, heads=options.heads, mlp="swiglu", mlp_hidden=11 * options.hidden // 4
    )
    pattern = AttentionPattern("block_diffusion", options.context, options.block_size, last_clean=False)
    batch = Batch(config, pattern, options.micro_batch, 0, weight=dtype.itemsize, device=device.type)

    def seconds(**sides: Callable[[], object]) -> dict[str, float]:
        repeated: dict[str, Callable[[], None]] = {name: partial(_several, run) for name, run in sides.items()}
        return {name: statistics.median(values) / LAUNCHES for name, values in alternate(repeated, options.rounds, device).items()}

    memory = _memory(device, dtype, seconds, options.hidden * options.micro_batch * options.context)
    found: dict[str, Any] = {"device": name or device.type, "memory_bytes_per_second": memory}
    shapes = [shape for half in ("attention", "mlp") for shape in half_products(batch, False, half)]
    found["products"] = [_product(shape, dtype, device, known, memory, seconds) for shape in shapes]
    for kind, shape in (("flex", pattern), ("sdpa", AttentionPattern("full", options.context, options.context))):
        found[kind] = _attention(replace(batch, pattern=shape), dtype, device, seconds)
    if not parallel_state.model_parallel_is_initialized():
        layout.start(ParallelConfig(), options.device)
    found["head_loss_seconds"] = _head(config, max(1, options.micro_batch * options.context // 2), dtype, device, seconds)
    if known is not None:
        peak = known.peak("bf16")
        found["reached"] = {
            "product": statistics.median(share for product in found["products"] for share in product["shares"]),
            "memory": memory / known.bandwidth,
            **{kind: [rate / peak for rate in found[kind]["flops_per_second"]] for kind in ("flex", "sdpa")},
        }
    return found


def _several(run: Callable[[], object]) -> None:
    for _ in range(LAUNCHES):
        run()


def _memory(device: torch.device, dtype: torch.dtype, seconds: Callable[..., dict[str, float]], elements: int) -> float:
    """Bytes/s of a sum of two tensors of several layers' size."""
    one, two, out = (torch.ones(4 * elements, dtype=dtype, device=device) for _ in range(3))
    return 3.0 * out.nbytes / seconds(sum=lambda: torch.add(one, two, out=out))["sum"]


def _product(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    known: Device | None,
    memory: float,
    seconds: Callable[..., dict[str, float]],
) -> dict[str, Any]:
    """`shares`: of the peak, of the arithmetic, once the operands' way at this memory's speed is taken off."""
    rows, inputs, outputs = shape
    x, weight, gradient = (torch.randn(size, dtype=dtype, device=device) for size in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    taken = seconds(forward=lambda: x @ weight.t(), input=lambda: gradient @ weight, weight=lambda: gradient.t() @ x)
    flops, moved = 2.0 * rows * inputs * outputs, x.nbytes + weight.nbytes + gradient.nbytes
    shares = [] if known is None else [flops / known.peak("bf16") / max(time - moved / memory, 1e-9) for time in taken.values()]
    return {"rows_inputs_outputs": list(shape), "flops_per_second": {what: flops / time for what, time in taken.items()}, "shares": shares}


def _attention(batch: Batch, dtype: torch.dtype, device: torch.device, seconds: Callable[..., dict[str, float]]) -> dict[str, Any]:
    config, pattern = batch.config, batch.pattern
    q, k, v = (
        torch.randn(pattern.rows, batch.rows, config.heads, config.head_size, dtype=dtype, device=device, requires_grad=True)
        for _ in range(3)
    )
    gradient = torch.randn_like(q)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v, pattern), (q, k, v), gradient)

    taken = seconds(forward=lambda: attend(q, k, v, pattern), both=both)
    flops = 4.0 * TILE**2 * visited_tiles(pattern, pattern.rows) * batch.rows * config.heads * config.head_size
    backward = max(taken["both"] - taken["forward"], 1e-9)
    return {"seconds": [taken["forward"], backward], "flops_per_second": [flops / taken["forward"], 2.5 * flops / backward]}


def _head(
    config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device, seconds: Callable[..., dict[str, float]]
) -> dict[str, float]:
    """Of a forward, which forms the gradients: products and loss."""
    hidden = torch.randn(tokens, config.hidden, dtype=dtype, device=device, requires_grad=True)
    targets, weights = torch.randint(0, VOCABULARY - 1, (tokens,), device=device), torch.rand(tokens, device=device)
    factory = TensorParallelFactory(dtype=dtype, vocabulary_multiple=VOCABULARY_MULTIPLE["cuda"])
    heads = {kind: Head(replace(config, head_loss=kind), factory, VOCABULARY, VOCABULARY - 1, None) for kind in ("eager", "fused")}
    for one in heads.values():
        one.to(device)
        torch.nn.init.normal_(one.weight, std=0.02)
    return seconds(**{kind: partial(one, hidden, targets, weights) for kind, one in heads.items()})
