"""Which rank is slow: what each computes by itself in one step, without the time in which it waits for the others.

All ranks of a step end it together, so the time of a step says nothing about any of them. What is measured is the forward of the
layers (of the whole network, where these are compiled) and the wait for data: between them lie the collectives in which a fast rank
waits for a slow one. Collectives that a forward holds itself (of tensor parallelism, of ZeRO 3, those between compiled layers) are part of
it: there the ranks that wait for each other show about the same seconds, and a slow one stands out only against other replicas and by
its wait for data. Invariants: measured in the first step after a logging line, and read at the next, after its wait for the
device; events of the device measure it, the host waits for none; one reduction of a number per rank.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bd3_scale.distributed.layout import Layout

SLOW = 1.5
"""Times the median of its stage that a slow rank takes."""
LEAST = 0.05
"""Seconds more than the median that are worth a line."""
LONG = 10
"""Logging lines in a row."""


class Pace:
    """Hooks of `modules` measure the first step after a reading, between `begin_step` and `end_step`, and nothing else: no validation."""

    def __init__(self, layout: Layout, modules: Sequence[nn.Module] = ()) -> None:
        self.layout, self.measuring, self._due = layout, False, False
        self._data_seconds = 0.0
        self.hosts = layout.all_gather((socket.gethostname(), layout.pipeline_rank))
        self._cuda, self._marks = layout.device.type == "cuda", list[tuple[Any, Any]]()
        self._began: Any = None
        self._slow_lines: dict[int, int] = {}
        if layout.world_size > 1:
            for module in modules:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, prepend=True)

    def begin_step(self, waited: float) -> None:
        """`waited`: seconds for its rows."""
        if self._due:
            self.measuring, self._due, self._data_seconds = True, False, waited

    def end_step(self) -> None:
        self.measuring = False

    def _enter(self, *_: Any) -> None:
        if self.measuring:
            self._began = self._now()

    def _leave(self, *_: Any) -> None:
        if self.measuring:
            self._marks.append((self._began, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, tell: Callable[[str], None]) -> dict[str, float]:
        """Least, median and most seconds over all ranks, and a line to `tell` for a rank that has been slow for long; collective.
        Empty where there is one rank, or nothing was measured."""
        self._due = True
        if self.layout.world_size == 1 or not self._marks:
            return {}
        own = sum(begin.elapsed_time(end) / 1000 if self._cuda else end - begin for begin, end in self._marks) + self._data_seconds
        self._marks = []
        seconds = torch.zeros(self.layout.world_size, dtype=torch.float64, device=self.layout.device)
        seconds[self.layout.rank] = own
        dist.all_reduce(seconds)
        every = seconds.tolist()
        for line in self.judge(every):
            tell(line)
        return {"least": min(every), "median": statistics.median(every), "most": max(every)}

    def judge(self, every: Sequence[float]) -> list[str]:
        """What is to be said, once per rank, of the ranks that have been slow at the last LONG lines. `every`: seconds of each rank."""
        lines = []
        for stage in {stage for _, stage in self.hosts}:
            ranks = [rank for rank, (_, other) in enumerate(self.hosts) if other == stage]
            usual = statistics.median(every[rank] for rank in ranks)
            for rank in ranks:
                slow = every[rank] > max(SLOW * usual, usual + LEAST)
                self._slow_lines[rank] = self._slow_lines.get(rank, 0) + 1 if slow else 0
                if self._slow_lines[rank] == LONG:
                    lines.append(
                        f"rank {rank} on host {self.hosts[rank][0]} is slow: for {LONG} logging lines its own part of a step has taken "
                        f"{every[rank]:.3g} s or so, that of the others {usual:.3g} s, and all wait for it; look at its clocks and "
                        "temperature (nvidia-smi -q -d PERFORMANCE), its other processes and its disk"
                    )
        return lines
