"""FlexAttention's kernels for sm_90, written by Inductor and compiled by Triton and ptxas, on a machine without a GPU or its driver.

`python -m tests.fake_cuda.ahead_worker OUT.json [REPORT.md]` in an environment with torch's CUDA build. What torch would ask the driver
is answered as by an H100; the graph of one attention, forward or backward, is given to Inductor as Dynamo and autograd would, with the
BlockMask of `attention/kernels.py`; nothing runs. Of each kernel: registers, bytes that are spilled, shared memory, and whether its
products are wgmma.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import operator
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._higher_order_ops.flex_attention import flex_attention, flex_attention_backward
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import fake_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bd3_scale.attention import kernels
from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.objectives.table import ObjectiveSchedule
from bd3_scale.recipe.objective_kinds import ROW_MULTIPLE
from bd3_scale.recipe.schema import ObjectiveConfig
from tests.fake_cuda.ahead_cases import CASES, Case

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20,
)  # fmt: skip
OPTIONS = {
    "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False, "WRITE_DQ": True, "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}  # fmt: skip
"""What `torch.nn.attention.flex_attention` adds to a call without options, where a gradient is wanted."""
BATCH, HEADS, WORDS = 2, 4, 130


def without_a_driver() -> list[str]:
    """Answer for the driver, for the rest of the process; the sources of Triton kernels that Inductor writes go to the list returned."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": H100, "get_device_capability": (9, 0),
        "get_device_name": H100.name, "synchronize": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "is_bf16_supported": True,
        "get_rng_state": torch.zeros(1, dtype=torch.uint8), "set_rng_state": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *unused, answer=answer, **also_unused: answer)
    torch._C._cuda_getCurrentRawStream = lambda device=0: 0  # type: ignore[attr-defined, assignment]
    interface: Any = CudaInterface
    interface.get_compute_capability = staticmethod(lambda device=None: 90)
    interface.is_available = staticmethod(lambda: True)
    interface.get_device_properties = staticmethod(lambda device=None: H100)
    interface.Worker.get_device_properties = staticmethod(lambda device=None: H100)
    interface.Worker.current_device = staticmethod(lambda: 0)
    fake_tensor.init_gpu_context = lambda device=None: None  # type: ignore[assignment]
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda mode: True)  # type: ignore[assignment, method-assign]
    limits = {"max_shared_mem": H100.shared_memory_per_block_optin, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_active_torch_device=lambda: torch.device("cuda"),
            utils=SimpleNamespace(get_device_properties=lambda device: limits),
        )
    )
    sources: list[str] = []

    def keep(compiler: Any, name: str, source: str, *unused: Any, **also_unused: Any) -> Callable[..., None]:
        sources.append(source)
        return lambda *unused, **also_unused: None

    AsyncCompile.triton = keep  # type: ignore[method-assign, assignment]
    return sources


def pattern_of(case: Case) -> AttentionPattern:
    """As a recipe has it on CUDA."""
    schedule = ObjectiveSchedule(
        ObjectiveConfig(block_size=case.block_size), case.length, WORDS,
        row_multiple=ROW_MULTIPLE["cuda"], document_end=3 if case.documents else None,
    )  # fmt: skip
    return schedule.at(0).pattern


def graph(case: Case, backward: bool) -> tuple[fx.GraphModule, list[Tensor]]:
    """The attention as Inductor gets it, and its inputs, which have no data."""
    pattern, mode = pattern_of(case), fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    queries = pattern.scored_rows if case.scored else pattern.rows
    segments = torch.zeros(BATCH, pattern.rows, dtype=torch.int32)
    block_mask: Any
    if case.documents:
        block_mask = kernels.document_block_mask(pattern, queries, segments)
    else:
        block_mask = kernels.block_mask(pattern, queries, torch.device("cpu"))
    places = [torch.zeros((), dtype=torch.int32) for _ in range(4)]
    number = torch.zeros(())
    root, lines = torch.nn.Module(), fx.Graph()
    root.score = make_fx(lambda score, *place: score)(number, *places)
    root.joint = make_fx(lambda score, b, h, m, n, gradient: [gradient, None, None, None, None])(number, *places, number)
    mask, captured = (masked_documents(pattern), (segments,)) if case.documents else (block_mask.mask_mod, ())
    root.mask = make_fx(mask, decomposition_table=select_decomp_table())(*places, *captured)
    inputs: list[Tensor] = []

    def placeholder(shape: tuple[int, ...], dtype: torch.dtype, rows_first: bool = False) -> fx.Node:
        node = lines.placeholder(f"input_{len(inputs)}")
        with mode:
            made = torch.empty(shape, dtype=dtype, device="cuda")
            inputs.append(made.permute(1, 2, 0, 3) if rows_first else made)
        node.meta["val"] = inputs[-1]
        return node

    dtype, width = getattr(torch, case.dtype), case.head_size
    asking, answering = (queries, BATCH, HEADS, width), (pattern.rows, BATCH, HEADS // case.groups, width)
    tensors = [placeholder(shape, dtype, rows_first=True) for shape in (asking, answering, answering)]
    if backward:
        tensors += [placeholder(asking, dtype, rows_first=True), placeholder((BATCH, HEADS, queries), torch.float32)]
        tensors += [placeholder(asking, dtype, rows_first=True), placeholder((BATCH, HEADS, queries), torch.float32)]
    tables = [placeholder(tuple(part.shape), part.dtype) if isinstance(part, Tensor) else part for part in block_mask.as_tuple()[:-1]]
    others = tuple(placeholder(tuple(one.shape), one.dtype) for one in captured)
    score, joint = lines.get_attr("score"), lines.get_attr("joint")
    masks = (*tables, lines.get_attr("mask"))
    rest = (masks, width**-0.5, dict(OPTIONS), (), others)
    called = (*tensors, score, joint, *rest) if backward else (*tensors, score, *rest)
    answer = lines.call_function(flex_attention_backward if backward else flex_attention, called)
    with mode:
        sums = [torch.empty((BATCH, HEADS, queries), device="cuda") for _ in range(2)]
        like = [torch.empty_like(one) for one in inputs[:3]] if backward else [torch.empty_like(inputs[0]), *sums]
    answer.meta["val"] = (*like, ()) if backward else tuple(like)
    parts = [lines.call_function(operator.getitem, (answer, index)) for index in range(3 if backward else 2)]
    for part, value in zip(parts, like, strict=False):
        part.meta["val"] = value
    lines.output(tuple(parts))
    return fx.GraphModule(root, lines), inputs


def masked_documents(pattern: AttentionPattern) -> Callable[..., Tensor]:
    """`kernels.document_block_mask`'s mask, with the segments as an argument: so Dynamo hands over what a mask holds."""
    from torch._dynamo._trace_wrapped_higher_order_op import mod_index

    def mask(sample: Tensor, head: Tensor, query: Tensor, key: Tensor, segments: Tensor) -> Tensor:
        return kernels.visible(pattern, query, key) & (mod_index(segments, [sample, query]) == mod_index(segments, [sample, key]))

    return mask


def written(case: Case, backward: bool, sources: list[str]) -> list[str]:
    """The Triton kernels of it, FlexAttention's own only."""
    sources.clear()
    module, inputs = graph(case, backward)
    mode = inputs[0].fake_mode  # type: ignore[attr-defined]
    settings = torch._inductor.config.patch(force_disable_caches=True, compile_threads=1)
    with mode, settings, torch._monitors.tracing(torch._monitors.TracingContext(mode)):
        torch._inductor.compile_fx.compile_fx_inner(module, inputs)
    return [source for source in sources if "triton_heuristics.template" in source]


def compiled(source: str, folder: Path) -> dict[str, Any]:
    """What ptxas says of a kernel."""
    import triton
    from torch._inductor.runtime import triton_heuristics
    from triton.backends.compiler import GPUTarget

    found: dict[str, Any] = {}

    def template(**settings: Any) -> Callable[[Any], Any]:
        found.update(settings)
        return lambda function: found.update(function=function)

    path = folder / "kernel.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("kernel", path)
    assert spec is not None and spec.loader is not None
    with mock.patch.object(triton_heuristics, "template", template):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    meta = found["triton_meta"]
    asked = triton.compiler.ASTSource(found["function"], meta["signature"], meta["constants"], meta["configs"][0])
    options = {"num_warps": found["num_warps"], "num_stages": found["num_stages"]}
    kernel = triton.compile(asked, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = folder / "kernel.ptx"
    ptx.write_text(kernel.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [str(ptxas), "-v", "--gpu-name", "sm_90a", str(ptx), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = {name: int(re.findall(rf"(\d+) {text}", said)[0]) for name, text in TOLD.items()}
    return {**numbers, "shared": kernel.metadata.shared, "wgmma": "wgmma" in kernel.asm["ptx"], **options}


TOLD = {"registers": "registers", "spilled": "bytes spill stores", "stack": "bytes stack frame"}


def main() -> None:
    sources, results = without_a_driver(), []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            for backward in (False, True):
                for source in written(case, backward, sources):
                    line = {"name": case.name, **asdict(case), "backward": backward, **compiled(source, Path(folder))}
                    results.append(line)
                    print(line, flush=True)
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n")
    for path in sys.argv[2:]:
        Path(path).write_text(report(results))


def report(results: list[dict[str, Any]]) -> str:
    """The same for people."""
    import triton

    lines = [
        "# FlexAttention's kernels for an H100, compiled ahead of time",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, triton {triton.__version__}, for sm_90a, bf16. Nothing ran: the kernels that",
        "Inductor writes for the BlockMasks of `attention/kernels.py`, without autotuning, and what ptxas says of them.",
        "With L' = L a row is one stream, which plain attention computes: there is no kernel of ours.",
        "",
        "| attention | pass | warps | stages | registers | spilled, bytes | shared, KiB | wgmma |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        way, units = "backward" if one["backward"] else "forward", "yes" if one["wgmma"] else "no"
        numbers = (one["num_warps"], one["num_stages"], one["registers"], one["spilled"], f"{one['shared'] / 1024:.1f}", units)
        lines.append(f"| {one['name']} | {way} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
