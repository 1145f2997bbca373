"""Turns a hang into an error: a rank whose main thread does nothing for too long ends the job, and every rank leaves its stacks behind.

The monitor (rank_monitor.py) finds ranks that are dead or stopped; here the process lives and beats, but its main thread waits: for a
collective that another rank does not enter, for a file system, for a lock. How long is too long follows the run: `parallel.hang` times the
longest piece of work that it has done, once it has done some of the kind. Invariants: the time is counted only from the first beat of a
`HeartbeatFile` to the end of the `with`, so that start-up and the end of a run may take what they need; time in which the whole process was
stopped does not count; it fires before collectives time out by themselves (which with NCCL ends the process without a word).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from bd3_scale.distributed.layout import Layout
from bd3_scale.fault_tolerance.heartbeat_file import HeartbeatFile
from bd3_scale.fault_tolerance.rank_monitor import CURE, RankMonitor, end_process
from bd3_scale.recipe.schema import ParallelConfig

SHARE_OF_TIMEOUT = 0.9
"""Of parallel.timeout: a bit less than what collectives are given."""
LEAST = 120.0
"""Seconds that any work may take, however fast the run has been so far."""
RECORDED = "2000"
"""Collectives that NCCL's flight recorder remembers."""


class Watchdog:
    """`with Watchdog(...):` around work that beats. `tell` gets one line, in the watchdog's thread, once. `seconds`: the limit at most;
    `times`: that of the longest piece of work (0: `seconds` alone)."""

    def __init__(
        self, heartbeat: HeartbeatFile, seconds: float, stacks: Path, rank: int, tell: Callable[[str], None], times: float = 0
    ) -> None:
        self.heartbeat, self.seconds, self.stacks, self.rank, self._tell, self.times = heartbeat, seconds, stacks, rank, tell, times
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()
        self._thread.join(1.0)  # it may be in the middle of ending this process

    def dump(self) -> None:
        """Write the stacks of all threads of this rank to `stacks`/rank-NNNNN.txt."""
        self.stacks.mkdir(parents=True, exist_ok=True)
        with open(self.stacks / f"rank-{self.rank:05d}.txt", "w") as file:
            heartbeat = self.heartbeat
            file.write(f"rank {self.rank}: {heartbeat.count} pieces of work done, the last at step {heartbeat.step} ({heartbeat.doing})\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if torch.cuda.is_initialized() and dist.is_initialized():
            with contextlib.suppress(Exception):  # last words: nothing must keep this process from ending
                (self.stacks / f"nccl-rank-{self.rank}").write_bytes(recorded())

    def limit(self) -> float:
        """Seconds for which the work under way may take."""
        usual = self.heartbeat.usual() if self.times else None
        return self.seconds if usual is None else min(self.seconds, max(LEAST, self.times * usual))

    def _watch(self) -> None:
        interval = min(1.0, self.seconds / 10)
        seen, still, before = 0, 0.0, time.monotonic()
        while not self._closing.wait(interval):
            now = time.monotonic()
            passed, before = min(now - before, 2 * interval), now  # a process that was stopped was not idle
            still = still + passed if self.heartbeat.count == seen and seen else 0.0
            seen = self.heartbeat.count
            if still >= (limit := self.limit()):
                cure = "parallel.timeout" if limit == self.seconds else f"parallel.hang (times what a step has taken, {self.times:g})"
                self._tell(
                    f"rank {self.rank} has done nothing for {still:.0f} s (step {self.heartbeat.step}, {self.heartbeat.doing}), "
                    f"which is a hang; the stacks of all ranks are in {self.stacks}; raise {cure} where it was only slow"
                )
                return


def watchdog(heartbeat: HeartbeatFile, layout: Layout, parallel: ParallelConfig, stacks: Path, monitor: RankMonitor | None) -> Watchdog:
    """The watchdog of a training: with other ranks it speaks through the guard, which lets all of them leave their stacks."""

    def alone(line: str) -> None:
        made.dump()
        end_process(f"bd3_scale: error: {line}; {CURE}", 0.0)

    tell = alone if monitor is None or layout.world_size == 1 else monitor.complain
    made = Watchdog(heartbeat, SHARE_OF_TIMEOUT * parallel.timeout, stacks, layout.rank, tell, times=parallel.hang)
    if layout.device.type == "cuda":
        stacks.mkdir(parents=True, exist_ok=True)  # NCCL, where it ends the process by itself, writes there, too
    return made


def record_collectives(stacks: Path) -> None:
    """Turn NCCL's flight recorder on; call before the world is joined. `python -m torch.distributed.flight_recorder.fr_trace` reads it."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(stacks.absolute() / "nccl-rank-"))


def recorded() -> bytes:
    """What the flight recorder has, as its own reader wants it."""
    import torch._C._distributed_c10d as c10d

    found: bytes = getattr(c10d, "_dump_nccl_trace" if hasattr(c10d, "_dump_nccl_trace") else "_dump_fr_trace")()
    return found


def collectives() -> dict[str, int]:
    """Group -> collectives that this rank has entered in it so far; equal names are equal groups on all ranks."""
    found: dict[str, int] = {}
    for group, name in list(dist.distributed_c10d._world.pg_names.items()):
        if group.size() > 1:
            for device in group._device_types:
                backend: Any = group._get_backend(device)
                with contextlib.suppress(AttributeError, RuntimeError):  # of a backend that does not count
                    found[f"{name}{device.type[0]}"] = backend._get_sequence_number_for_group()
    return found
