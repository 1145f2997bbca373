"""SIGTERM, SIGUSR1, SIGINT and the wall-clock limit become a stop at a step boundary that all ranks agree on.

Invariants: ranks get signals at different moments but leave the loop after the same step. The question is asked once per
step (and now and then during a validation) by a one-number reduction on the host that is answered when the next one is
asked, so that nobody waits for it. Before the loop listens, and after it, there is nothing to save, and a signal ends the process at
once (`leaving`). All ranks begin and cease to listen together, so that none is left alone in a collective by those that have left.
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

import bd3_scale
from bd3_scale.distributed.layout import Layout
from bd3_scale.fault_tolerance import early_exit
from bd3_scale.messages import log

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_KEY_PRESS = 2.0
"""Seconds in which a SIGINT counts as the one before: a launcher may hand a Ctrl-C on to ranks that the terminal reached."""
GRACE = 1.0
"""Seconds for which a signal that reached another rank may be late here."""


def seconds_left(limit: float | None) -> float | None:
    """Of a wall-clock limit that counts from the start of this process."""
    return None if limit is None else limit - (time.monotonic() - bd3_scale.STARTED)


class StopRequest:
    """Install once per run, in the main thread. A second SIGINT, by a person who will not wait, is a KeyboardInterrupt."""

    def __init__(self, layout: Layout, seconds: float | None = None) -> None:
        """`seconds`: stop by itself after these (run.time_limit)."""
        self.layout = layout
        self.requested: str | None = None
        """Name of the first signal that this rank got, or of the limit."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._agreed = False
        self._at = 0.0
        self._over = self._late = False
        """Whether the loop has been left, and whether a signal came after that."""
        self._question: tuple[torch.Tensor, Any] | None = None
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        early_exit.listening.set()
        if early_exit.heard:
            self._receive(early_exit.heard[0], None)
        self._together()

    def _together(self, told: bool = False) -> bool:
        """Wait for all ranks; whether any was told. Where a peer has left (told, while it did not listen), this one does if it was."""
        if self.layout.world_size == 1:
            return False
        try:
            return any(self.layout.all_gather(told))
        except RuntimeError:
            end = time.monotonic() + GRACE
            while self.requested is None and time.monotonic() < end:
                time.sleep(0.01)
            if self.requested is not None:
                os._exit(0)
            raise

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._late = self._late or self._over
        if self.requested is None:
            self.requested, self._at = signal.Signals(number).name, now
            if self.layout.is_main_rank:
                # Not print: a handler may run in the middle of another print.
                text = f"\nbd3_scale: {self.requested}: stopping after this step and saving; Ctrl-C again stops at once\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        elif number == signal.SIGINT and now - self._at > SAME_KEY_PRESS:
            raise KeyboardInterrupt

    def agreed(self) -> bool:
        """Whether all ranks stop here; once true, always. Every rank calls it as often as the others."""
        if self._deadline is not None and self.requested is None and time.monotonic() > self._deadline:
            self.requested = "run.time_limit"
            if self.layout.is_main_rank:
                log.info("run.time_limit: stopping after this step and saving")
        if self._agreed:
            return True
        if self.layout.world_size == 1:
            self._agreed = self.requested is not None
            return self._agreed
        self._agreed = self._answer()
        if not self._agreed:
            flag = torch.tensor([int(self.requested is not None)])
            self._question = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        return self._agreed

    def close(self) -> None:
        """After all is saved: give the signals back, on all ranks together. Of several ranks none stays if the signal came too late
        for the loop: it may reach some of them before and some after they cease to listen."""
        if not self._before:
            return
        self._answer()
        self._over = True
        leaves = self._together(told=self.requested is not None and not self._agreed)
        early_exit.listening.clear()
        if leaves or (self._late and self.layout.world_size > 1):
            early_exit.leave(self.requested or "another rank", self.layout.is_main_rank)
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
