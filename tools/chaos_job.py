"""The ranks that chaos.py disturbs, and where their run stands as its folder shows it.

Invariants: there is no launcher that would answer for the ranks; they form one process group, so that a signal reaches all at once; their
output goes to a file, which no orphan keeps open; nothing outlives `end`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REFUSED = "which lives; wait for its end"
"""Words of a job in whose folder another one lives."""
MOMENTS = ("start-up", "step", "save", "validation", "tuning")


class Job:
    """The ranks of a training: one process each in a process group of their own, their output in a file."""

    def __init__(self, ranks: int, command: list[str], folder: Path) -> None:
        folder.mkdir(parents=True)
        self.log, self.traces = folder / "log", [folder / f"rank-{rank}.jsonl" for rank in range(ranks)]
        base = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        base |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
        base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())} if ranks > 1 else {}
        self.processes: list[subprocess.Popen[bytes]] = []
        with open(self.log, "wb") as output:
            for rank, trace in enumerate(self.traces):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks} if ranks > 1 else {}
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(Path(__file__).with_name("chaos.py")), "rank", str(trace), *command],
                        env=base | {name: str(value) for name, value in place.items()},
                        stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
                        process_group=self.processes[0].pid if self.processes else 0,
                    )
                )  # fmt: skip

    @property
    def ended(self) -> bool:
        """Whether any of its ranks has."""
        return any([process.poll() is not None for process in self.processes])

    def send(self, number: int, rank: int | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            if rank is None:
                os.killpg(self.processes[0].pid, number)
            else:
                self.processes[rank].send_signal(number)

    def wait(self, limit: float) -> tuple[list[int | None], float]:
        """Exit statuses (None: had to be killed) and the seconds until the last rank had left."""
        start = time.monotonic()
        while any([process.poll() is None for process in self.processes]) and time.monotonic() - start < limit:
            time.sleep(0.01)
        seconds = time.monotonic() - start
        statuses = [process.poll() for process in self.processes]
        self.end()
        return statuses, seconds

    def end(self) -> None:
        if any([process.poll() is None for process in self.processes]):
            self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Second:
    """A job submitted into the folder of another after some seconds, from a thread."""

    def __init__(self, command: list[str], folder: Path, delay: float) -> None:
        self.job: Job | None = None
        self._timer = threading.Timer(delay, self._submit, (command, folder))
        self._timer.start()

    def _submit(self, command: list[str], folder: Path) -> None:
        self.job = Job(1, command, folder)

    def outcome(self) -> tuple[str, int | None]:
        """refused | trained | "" where it had not been submitted yet; and its status. Waits for its end."""
        self._timer.cancel()
        self._timer.join()
        if self.job is None:
            return "", 0
        ((status,), _) = self.job.wait(900.0)
        return "refused" if REFUSED in self.job.log.read_text(errors="replace") else "trained", status


class Watch:
    """Where a run stands, as its folder shows it."""

    def __init__(self, run: Path, validation_due: set[int], tuner_due: set[int]) -> None:
        self.metrics, self.checkpoints, self.due = run / "metrics.jsonl", run / "checkpoints", (validation_due, tuner_due)
        self._before = self._identity()

    def _identity(self) -> int | None:
        return self.metrics.stat().st_ino if self.metrics.exists() else None

    def now(self) -> tuple[str, int]:
        """The moment, one of MOMENTS, and the last step with a training line."""
        if not self.metrics.exists() or self._identity() == self._before:
            return "start-up", 0  # a continued run begins with a new file of the old lines
        lines = [line for line in map(_whole, self.metrics.read_text().splitlines()) if line]
        step = max((line["step"] for line in lines if line["kind"] == "train"), default=0)
        done = {line["kind"] for line in lines if line["step"] == step}
        names = os.listdir(self.checkpoints) if self.checkpoints.exists() else []
        if any(name.startswith("step_") and ".tmp-" in name for name in names):
            return "save", step
        if "train" in done and step in self.due[1] and "tuner" not in done:
            return "tuning", step
        if "train" in done and step in self.due[0] and "validation" not in done:
            return "validation", step
        return "step", step


def _whole(text: str) -> dict[str, Any] | None:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
