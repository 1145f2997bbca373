"""What is measured while training, and the file it goes to.

Invariants: between logging steps numbers stay on the device and nobody waits for them; a logging step makes one small
reduction over the replicas; tokens are data tokens, counted once although the network's input is 2L long; metrics.jsonl
never holds a step twice, however often the run was killed and continued.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor


class Meter:
    """Collects the steps since the last reading."""

    def __init__(self, device: torch.device, data_tokens: int, flops_per_token: float, peak_flops: float | None) -> None:
        """`peak_flops`: of all ranks together, or None where unknown (then MFU is None)."""
        self.device, self.flops_per_token, self.peak_flops = device, flops_per_token, peak_flops
        self.losses: list[Tensor] = []
        self.norm: Tensor | None = None
        self.tokens, self.clock = data_tokens, time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """This rank's part of a step's train loss and the (global) gradient norm; scalars on the device."""
        self.losses.append(loss)
        self.norm = norm

    def read(self, data_tokens: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Means since the last reading. `data_tokens`: of the run so far; `reduce`: sum over the replicas, in place."""
        loss = reduce(torch.stack(self.losses).sum().double()) / len(self.losses)
        values = loss.item(), float(self.norm) if self.norm is not None else math.nan  # the one wait for the device
        now = time.perf_counter()
        rate = (data_tokens - self.tokens) / (now - self.clock)
        self.losses, self.tokens, self.clock = [], data_tokens, now
        return {
            "loss": values[0],
            "gradient_norm": values[1],
            "tokens_per_second": rate,
            "mfu": None if self.peak_flops is None else rate * self.flops_per_token / self.peak_flops,
            "memory_bytes": memory_bytes(self.device),
        }

    def skip(self, seconds: float) -> None:
        """Leave time spent on something else than training (a validation, a checkpoint) out of the rate."""
        self.clock += seconds


def memory_bytes(device: torch.device) -> int:
    """Peak of the allocator on CUDA, resident memory of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class MetricsFile:
    """metrics.jsonl: one JSON object a line, in order of steps."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Lines of steps after `first_step` are of a future that the continued run will live again: they go."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= first_step]
            rest = path.with_suffix(".rest")
            rest.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(rest, path)
        self.seconds = _last_seconds(path)
        self.start = time.perf_counter()

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Append `line` and the training time so far, over all starts of the run. Returns the line as written."""
        line = {**line, "seconds": round(self.seconds + time.perf_counter() - self.start, 3)}
        with open(self.path, "a") as file:
            file.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")
        return line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity: they are written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _last_seconds(path: Path) -> float:
    return max((line.get("seconds", 0.0) for line in read_metrics(path)), default=0.0) if path.exists() else 0.0
