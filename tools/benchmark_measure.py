"""How the benchmarks measure: sides that take turns in one run, bytes at the allocator, time by part, a dated report.

Invariants: two things are compared in the same rounds, so that a noisy machine meets both; the first round warms up and does not count; a
ratio is the median over rounds; what is written down has commit, machine, command and numbers.
"""

from __future__ import annotations

import json
import os
import platform
import statistics as statistics_module
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

PARTS = {
    "attention": ("scaled_dot_product", "flash", "flex_attention", "fmha", "sdpa"),
    "optimizer": ("adam", "_foreach_", "multi_tensor_apply"),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "gemm", "nvjet", "xmma", "cutlass"),
    "communication": ("c10d::", "gloo:", "nccl"),
}
"""Parts of a step -> what the names of their operators (CPU) or kernels (CUDA) hold; the rest is elementwise work, norms and copies."""


def kept_and_peak_bytes(step: Callable[[], None]) -> tuple[int, int]:
    """On CPU, above what was alive before: bytes when the backward begins (with the head's), and the highest number of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    turn = min(event.start_ns() for event in events if event.name() == "autograd::engine::evaluate_function: _LinearLossBackward")
    memory = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    alive = np.cumsum([event.nbytes() for event in memory])
    return int(alive[np.searchsorted([event.start_ns() for event in memory], turn) - 1]), int(alive.max())


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Highest number of bytes alive during `step` above those alive before it, counted at the allocator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(alive.max())


def alternate(sides: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every side in every round; the sides take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
        print(f"round {turn}/{rounds}" + (" (warm-up)" if turn == 0 else ""), file=sys.stderr, flush=True)
    return seconds


def split_of_time(step: Callable[[], None], vocabulary: int, device: torch.device) -> dict[str, float]:
    """Shares of the time of one step's operators, or of its kernels on CUDA (where an operator's time is that of its kernels once more):
    attention, head (products with V; on CUDA among the products), other products, optimizer, the rest."""
    activities, cuda = [torch.profiler.ProfilerActivity.CPU], device.type == "cuda"
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step()
        if cuda:
            torch.cuda.synchronize()
    seconds: dict[str, float] = {}
    for event in profile.key_averages(group_by_input_shape=True):
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        part = next((name for name, words in PARTS.items() if any(word in event.key for word in words)), "rest")
        if part == "products" and any(vocabulary in shape for shape in event.input_shapes if isinstance(shape, list)):
            part = "head"
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        seconds[part] = seconds.get(part, 0.0) + own
    total = sum(seconds.values())
    return {name: value / total for name, value in sorted(seconds.items(), key=lambda item: -item[1])}


def paired_ratio(ours: list[float], other: list[float]) -> float:
    """Median over rounds of ours / other: both sides of a round met the same machine."""
    return statistics_module.median(a / b for a, b in zip(ours, other, strict=True))


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_report(name: str, folder: Path, report: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{report['date']}-{name}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"# {name}, {report['date']}", "", f"Commit {report['commit']}; `{report['command']}`", "", "| what | value |", "|---|---|"]
    for section in ("machine", "options", "result"):
        for key, value in report[section].items():
            if key != "seconds":
                lines.append(f"| {key.replace('_', ' ')} | {_readable(value)} |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return stem.with_suffix(".md")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_readable(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
