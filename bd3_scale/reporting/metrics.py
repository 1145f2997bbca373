"""What is measured while training, and the file it goes to.

Invariants: between logging steps numbers stay on the device and nobody waits for them; a logging step makes one small
reduction over the replicas; tokens are data tokens, counted once although the network's input is 2L long, of a rate those that count
(neither filling nor prompts); metrics.jsonl
is strict JSON, grows by whole lines, and never holds a step twice, however often the run was killed and continued.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from bd3_scale.errors import TrainingError
from bd3_scale.messages import log

AT_START = ("amendment", "probe")
"""Kinds of lines that a start writes before its first step."""


class Meter:
    """Collects the steps since the last reading."""

    def __init__(self, device: torch.device, data_tokens: int, peak_flops: float | None) -> None:
        """`data_tokens`: of the run so far. `peak_flops`: FLOP/s of all ranks together, or None where unknown (then MFU is None)."""
        self.device, self.peak_flops = device, peak_flops
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._controlled: list[Tensor] = []
        self._counted: list[float] = []
        self._tokens, self._clock = data_tokens, time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor, control: float = 0.0, counted: float = 1.0) -> None:
        """This rank's part of a step's train loss and the (global) gradient norm; scalars on the device, not waited for. `control`: what is
        subtracted from the loss for `controlled_loss`. `counted`: share of the step's tokens that count."""
        self._counted.append(counted)
        self._losses.append(loss.detach())
        self._controlled.append(loss.detach() - control)
        self._norms.append(norm.detach())

    def read(self, data_tokens: int, reduce: Callable[[Tensor], Tensor], flops_per_token: float) -> dict[str, Any]:
        """Means over the steps since the last reading, at least one; of those that have numbers, as far as any has. `reduce`: sum
        over the replicas, in place. `flops_per_token`: model FLOPs of a training step per data token, in all of these steps."""
        losses, norms = torch.stack(self._losses).double(), torch.stack(self._norms).double()
        losses, controlled = reduce(torch.stack([losses, torch.stack(self._controlled).double()]))
        means = torch.stack([_finite_mean(steps) for steps in (losses, norms, controlled)]).tolist()  # the one wait for the device
        now = time.perf_counter()
        rate = (data_tokens - self._tokens) / (now - self._clock)
        counted = sum(self._counted) / len(self._counted)
        self._losses, self._norms, self._controlled, self._counted = [], [], [], []
        self._tokens, self._clock = data_tokens, now
        return {
            "loss": means[0],
            "controlled_loss": means[2],
            "gradient_norm": means[1],
            "tokens_per_second": rate * counted,
            "mfu": None if self.peak_flops is None else rate * flops_per_token / self.peak_flops,
            "memory_bytes": memory_bytes(self.device),
        }

    def skip(self, seconds: float) -> None:
        """Leave time spent on something else than training (a validation, a checkpoint) out of the rate."""
        self._clock += seconds


def _finite_mean(values: Tensor) -> Tensor:
    """Mean of the finite ones; where none is, the last."""
    finite = torch.isfinite(values)
    mean = torch.where(finite, values, 0.0).sum() / finite.sum().clamp(min=1)
    return torch.where(finite.any(), mean, values[-1])


def memory_bytes(device: torch.device) -> int:
    """Peak of the allocator on CUDA, resident memory of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class MetricsFile:
    """metrics.jsonl: one JSON object a line, in order of steps. One process writes it."""

    def __init__(self, path: Path, first_step: int, may_write: Callable[[], None] = lambda: None) -> None:
        """Lines of steps after `first_step` are of a future that the continued run will live again, and those of its start are said again:
        they go. `may_write` raises where the file belongs to another job by now (fault_tolerance/run_owner.py)."""
        self.path, self._may_write = path, may_write
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_metrics(path) if path.exists() else []
        kept = [line for line in lines if line["step"] < first_step + (line.get("kind") not in AT_START)]
        if path.exists():
            rest = path.with_suffix(".rest")
            rest.write_text("".join(_encode(line) for line in kept))
            os.replace(rest, path)
        self._before = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        self._start = time.perf_counter()

    def write(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Append `line` and the `seconds` of all starts of the run so far. Returns the line as written.

        Raises TrainingError where the file system takes no more, ValueError for what is no number, text, list or mapping.
        """
        self._may_write()
        written = {**line, "seconds": round(self._before + time.perf_counter() - self._start, 3)}
        data = _encode(written).encode()
        try:
            # One write of the whole line at the end of the file: readers and kills see lines, not halves.
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if os.write(file, data) != len(data):
                    raise OSError("the line was cut short")
            finally:
                os.close(file)
        except OSError as error:
            reason = error.strerror or str(error)
            raise TrainingError(f"{self.path} cannot be written ({reason}); free space there or set another run.dir") from None
        return written


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl. A last line that a kill cut short is left out; any other damage with a warning."""
    lines: list[dict[str, Any]] = []
    texts = path.read_text(errors="replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts):
            log.warning(f"{path} line {number} is damaged and left out")
    return lines


def _encode(line: Mapping[str, Any]) -> str:
    return json.dumps(_plain(line), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """As JSON knows it: numbers of torch and NumPy as Python's; nan and infinities, which JSON has not, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"metrics.jsonl cannot hold {value!r}")
