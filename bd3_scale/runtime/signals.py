"""SIGTERM, SIGUSR1 and SIGINT become a stop at a step boundary that all ranks agree on.

Invariant: ranks get signals at different moments but leave the loop after the same step. The question is asked once per
step by a one-number reduction on the host that is answered one step later, so that nobody waits for it.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from bd3_scale.parallel.layout import Layout

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Install once per run; a second SIGINT interrupts at once."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.requested: str | None = None
        self._question: tuple[torch.Tensor, Any] | None = None
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether all ranks stop here. Call once per step on every rank."""
        if self.layout.world_size == 1:
            return self.requested is not None
        if self._answer():
            return True
        flag = torch.tensor([int(self.requested is not None)])
        self._question = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        return False

    def close(self) -> None:
        """Give the signals back."""
        self._answer()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _answer(self) -> bool:
        if self._question is None:
            return False
        flag, work = self._question
        self._question = None
        work.wait()
        return bool(flag.item())
