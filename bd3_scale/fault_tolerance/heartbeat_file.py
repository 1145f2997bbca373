"""Signs of life of the main thread: a counter for the watchdog, and `heartbeat.json` in the run directory for whoever watches from outside.

A watcher (a liveness probe, a cron job) looks at the age of the file or at `time` in it: a run that is stuck does not touch it, although
its process and its threads live. Invariants: the file is always whole (it is replaced, never rewritten); it is written by the leader, at
most every few seconds, and at once when the run turns to another kind of work; a disk that is full costs the heartbeat, not the run.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HEARTBEAT = "heartbeat.json"
EVERY = 5.0
"""Seconds between two writings of the file."""
KNOWN_AFTER = {"train": 10, "validate": 1}
"""Pieces of a kind of work after which it is known how long they take; of others (a save waits for the disk) it never is."""


class HeartbeatFile:
    """`beat()` is called by the main thread whenever it has done a piece of work (a step, some rows of a validation)."""

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        world_size: int = 1,
        clock: Callable[[], float] = time.monotonic,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        """`folder`: where the file goes; None: this rank writes none. `may_write` raises where it is another job's (run_owner.py)."""
        self.count = 0
        """Beats so far; nothing is expected of the main thread before the first."""
        self.step, self.doing = 0, "start"
        self.total_steps, self.world_size = total_steps, world_size
        self._path = None if folder is None else folder / HEARTBEAT
        self._clock, self._written, self._may_write = clock, float("-inf"), may_write
        self._last, self._longest = clock(), 0.0
        self._pieces: Counter[str] = Counter()
        self.waits = False
        """Whether the main thread waits for something whose time says nothing of the run: rows that come from elsewhere."""

    def beat(self, step: int, doing: str) -> None:
        """`doing`: train | validate | save | finished | stopped | wait (for nodes)."""
        now, turned = self._clock(), doing != self.doing
        if self.count:
            self._pieces[self.doing] += 1
            self._longest = max(self._longest, now - self._last)
        self._last = now
        self.count, self.step, self.doing = self.count + 1, step, doing
        if self._path is not None and (turned or now - self._written >= EVERY):
            self._written = now
            self._may_write()
            self._write(self._path)

    def usual(self) -> float | None:
        """Seconds of the longest piece of work so far, of any kind; None where too few are known of the kind that is under way."""
        known = not self.waits and self._pieces[self.doing] >= KNOWN_AFTER.get(self.doing, math.inf)
        return self._longest if known else None

    def forget(self) -> None:
        """Work of another size begins (kernels may be compiled anew): what is known of it says nothing any more."""
        self._pieces.clear()

    def _write(self, path: Path) -> None:
        content = {
            "time": time.time(),
            "step": self.step,
            "total_steps": self.total_steps,
            "doing": self.doing,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world_size": self.world_size,
        }
        new = path.with_name(f".{path.name}.new")
        try:
            new.write_text(json.dumps(content) + "\n")
            new.replace(path)
        except OSError:  # the saver speaks of full disks, and has patience with them
            new.unlink(missing_ok=True)
