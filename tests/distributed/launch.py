"""Start torchrun for a test: output to a file, a time limit, and the whole process group ended whatever happens.

Jobs of several processes, whoever starts them (pytest has several workers), have at most PLACES of them at once: four ranks in step
with each other fill a small machine, and twice as many take far longer than one job after the other; two of two, which mostly start
and wait, take less.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
ALL = bool(os.environ.get("BD3_ALL_LAYOUTS"))
"""Whether everything is run: also what says in another layout what others say, for a change of what it is about and before a release."""


PLACES = 4
_turn: list[IO[str]] = []
"""The places that this process holds; a later job of the same process has them already."""


def take_turn(processes: int) -> None:
    """Wait until there are places for so many, in the order of those who ask."""
    if _turn:
        return
    with _lock("gate"):
        while len(_turn) < min(processes, PLACES):
            for place in range(PLACES):
                with contextlib.suppress(BlockingIOError):
                    _turn.append(_lock(str(place), fcntl.LOCK_NB))
                if len(_turn) == min(processes, PLACES):
                    return
            time.sleep(0.05)


def _lock(name: str, how: int = 0) -> IO[str]:
    """A file that is locked until it is closed, or this process ends."""
    file = open(Path(tempfile.gettempdir()) / f"bd3_scale-tests-{os.getuid()}-{name}.lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | how)
    except BlockingIOError:
        file.close()
        raise
    return file


def give_turn() -> None:
    """Let jobs of other processes begin."""
    while _turn:
        _turn.pop().close()


@dataclass
class Finished:
    status: int
    output: str


class Job:
    """A running `python -m torch.distributed.run`, or a plain `python` for one process."""

    def __init__(self, world_size: int, arguments: list[str], log: Path) -> None:
        launcher = [sys.executable]
        if world_size > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
        self.log = log
        if world_size > 1:
            take_turn(world_size)
        # A pipe would stay open as long as any orphan lives; a file does not.
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [*launcher, *arguments], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )

    def wait(self, timeout: float) -> Finished:
        """The result; after `timeout` seconds the job is ended and an AssertionError shows its output."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not finished after {timeout} s:\n{self.log.read_text()[-4000:]}") from None
        give_turn()
        return Finished(status, self.log.read_text())

    def kill(self) -> None:
        """kill -9 to every process of the job."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        give_turn()


def launch(world_size: int, arguments: list[str], log: Path, timeout: float = 300) -> Finished:
    return Job(world_size, arguments, log).wait(timeout)
