"""What a recipe asks of the compiler beyond the default, tried on the device before a run is built on it, and said.

`model.attention = flex_triton | flex_flash` asks for a backend of FlexAttention, `training.compile = max-autotune` for kernels that are
chosen by timing. Both depend on the GPU, its driver and what is installed. A probe compiles one small attention of the recipe's kind
(its head size, query heads per key head, mask, precision), forwards and backwards, and compares it with the dense reference.

Invariants: what was asked for is what runs, or there is a `TrainingError` that names the key and the cure, before any training; a GPU on
which the compiler would only warn and leave the tuning out is refused, too.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.attention.kernels import BACKENDS, attend, block_mask_of
from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.compiling import COMPILE_MODES, compiled_whole
from bd3_scale.costs.pipeline_stages import phases_of
from bd3_scale.errors import TrainingError, one_line
from bd3_scale.recipe import Recipe, resolve_precision

OPTIONS = (("model.attention", "flex_triton"), ("model.attention", "flex_flash"), ("training.compile", "max-autotune"))
"""(key, value) of all that can be probed."""
POSITIONS = 256
"""Of a probe: two tiles of FlexAttention in each half."""
TOLERANCE = {"bf16": 3e-2, "fp32": 5e-3}
"""Largest difference, in units of the largest value; on CUDA fp32 products may be TF32."""


@dataclass(frozen=True)
class Probed:
    """An option that works here."""

    key: str
    value: str
    device: str
    seconds: float
    """Compiling included."""
    difference: float
    """The largest of output and gradients from the reference's, in units of its largest value."""


@dataclass(frozen=True)
class Shape:
    """What decides which kernel is compiled."""

    pattern: AttentionPattern
    groups: int
    """Query heads of a key/value head."""
    head_size: int
    precision: str
    documents: bool
    """Whether documents of a row are kept apart."""


def shape_of(recipe: Recipe, device: str) -> Shape:
    """That of the phase of the run with the most rows: one stream needs no kernel of its own."""
    model = recipe.model
    pattern = max((phase.pattern for phase in phases_of(recipe, 1, device)), key=lambda pattern: pattern.rows)
    return Shape(
        pattern, model.heads // model.kv_heads, model.head_size, resolve_precision(recipe.training, device), recipe.data.document_mask
    )


def probe_recipe(recipe: Recipe, device: torch.device) -> list[Probed]:
    """Try everything that the recipe asks for by name; nothing for a recipe of defaults. Raises TrainingError for what does not work."""
    shape = shape_of(recipe, device.type)
    kernel, compile = recipe.model.attention, recipe.training.compile
    found = []
    if BACKENDS.get(kernel) is not None:
        found.append(probe(shape, device, kernel=kernel))
    if compile == "max-autotune":
        found.append(probe(shape, device, kernel=kernel, compile=compile))
    return found


def survey(recipe: Recipe, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Of `OPTIONS`, asked for or not: "key = value" of those that work, and {"key = value": what is wrong and the cure} of the others."""
    works, broken = [], {}
    shape = shape_of(recipe, device.type)
    for key, value in OPTIONS:
        try:
            probe(shape, device, **({"kernel": value} if key == "model.attention" else {"compile": value}))
            works.append(f"{key} = {value}")
        except TrainingError as error:
            broken[f"{key} = {value}"] = str(error)
    return works, broken


def probe(shape: Shape, device: torch.device, *, kernel: str = "auto", compile: str = "none") -> Probed:
    """Run `kernel` under `compile`; see the module's docstring. Raises TrainingError naming the key: that of `compile` unless none."""
    key, value = ("model.attention", kernel) if compile == "none" else ("training.compile", compile)
    cure = "set model.attention=auto" if compile == "none" else "set training.compile=blocks"
    if kernel == "flex_flash" and compile == "none":
        cure += ", or install FlashAttention 4 (pip install --pre flash-attn-4) on a GPU that it knows"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    start = time.perf_counter()
    try:
        if compile == "max-autotune":
            _need_tuning(device)
        difference = _difference(shape, device, kernel, compile)
    except Exception as error:  # compilers, drivers and kernel libraries have no common base
        text = one_line(error, 300)
        raise TrainingError(f"{key} = {value} does not work on {name} ({type(error).__name__}: {text}); {cure}") from error
    if not difference < TOLERANCE[shape.precision]:
        raise TrainingError(f"{key} = {value} on {name} differs from the reference by {difference:.1e} of its largest value; {cure}")
    return Probed(key, value, name, time.perf_counter() - start, difference)


def _need_tuning(device: torch.device) -> None:
    from torch._inductor.utils import is_big_gpu

    if device.type != "cuda" or not is_big_gpu(device):
        raise ValueError("the compiler tunes matrix products on GPUs of 68 multiprocessors and more, and would go on without")


def _difference(shape: Shape, device: torch.device, kernel: str, compile: str) -> float:
    """Of output and gradients, from those of the dense kernel in fp32."""
    pattern = replace(shape.pattern, length=POSITIONS, block_size=math.gcd(shape.pattern.block_size, POSITIONS))
    dtype = torch.bfloat16 if shape.precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    heads = (shape.groups, 1, 1, shape.groups)
    sizes = [(pattern.rows, 1, count, shape.head_size) for count in heads]
    numbers = [torch.randn(size, generator=generator).to(device=device, dtype=dtype) for size in sizes]
    one = torch.eye(shape.head_size, device=device, dtype=dtype)
    rows = torch.arange(pattern.rows, device=device) % POSITIONS
    segments = (rows // 100).to(torch.int32)[None] if shape.documents else None

    def run(q: Tensor, k: Tensor, v: Tensor, chosen: str, mask: Any) -> Tensor:
        return attend(F.linear(q, one.to(q.dtype)), k, v, pattern, chosen, segments, mask)  # a product, too, is tuned

    compiled = run if compile == "none" else compiled_whole(run, COMPILE_MODES[compile])
    answers = []
    for call, chosen, precision in ((compiled, kernel, dtype), (run, "dense", torch.float32)):
        q, k, v = (one.to(precision).requires_grad_() for one in numbers[:3])
        out = call(q, k, v, chosen, block_mask_of(chosen, pattern, pattern.rows, device, segments))
        answers.append([out.detach(), *torch.autograd.grad(out, (q, k, v), numbers[3].to(precision))])
    return max(float((mine.float() - right).abs().max() / right.abs().max()) for mine, right in zip(*answers, strict=True))


def as_line(found: Probed) -> dict[str, Any]:
    """What metrics.jsonl says of it."""
    return {"kind": "probe", **{name: value for name, value in asdict(found).items() if name != "seconds"}, "probe_seconds": found.seconds}


def as_text(found: Probed) -> str:
    """What a person reads."""
    return f"{found.key} = {found.value} works on {found.device}: within {found.difference:.0e} of the reference ({found.seconds:.1f} s)"
