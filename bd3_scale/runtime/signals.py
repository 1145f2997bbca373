"""SIGTERM, SIGUSR1 and SIGINT become a stop at a step boundary that all ranks agree on.

Invariant: ranks get signals at different moments but leave the loop after the same step. The question is asked once per
step by a one-number reduction on the host that is answered one step later, so that nobody waits for it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from bd3_scale.parallel.layout import Layout

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_KEY_PRESS = 2.0
"""Seconds in which a SIGINT counts as the one before: a launcher may hand a Ctrl-C on to ranks that the terminal reached."""


class StopRequest:
    """Install once per run, in the main thread. A second SIGINT, by a person who will not wait, is a KeyboardInterrupt."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.requested: str | None = None
        """Name of the first signal that this rank got."""
        self._at = 0.0
        self._question: tuple[torch.Tensor, Any] | None = None
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._at = signal.Signals(number).name, now
            if self.layout.leader:
                # Not print: a handler may run in the middle of another print.
                text = f"\nbd3_scale: {self.requested}: stopping after this step and saving; Ctrl-C again stops at once\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        elif number == signal.SIGINT and now - self._at > SAME_KEY_PRESS:
            raise KeyboardInterrupt

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
        """Give the signals back; the last question is answered on all ranks before groups go."""
        self._answer()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _answer(self) -> bool:
        if self._question is None:
            return False
        flag, work = self._question
        self._question = None
        work.wait()
        return bool(flag.item())
