"""A rank that dies or hangs ends the whole job, in time, with a line that names it; no process is left behind.

Knows nothing of layouts: another one is another row of LAYOUTS (overrides, rank that dies).
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.launch import ALL, Finished, Job, give_turn

LAYOUTS = {
    "data, zero 3": (4, ["parallel.zero=3"], 2),
    "a tensor peer": (4, ["parallel.tensor=2", "parallel.sequence=true"], 1),
    "a stage, zero 3": (4, ["parallel.pipeline=2", "parallel.zero=3"], 3),
    "a middle stage": (4, ["parallel.pipeline=4", "model.layers=4"], 2),
}
"""Processes, overrides, the rank that dies."""
KILLED = LAYOUTS if ALL else {name: LAYOUTS[name] for name in ("a tensor peer", "a middle stage")}
TWO = (2, ["parallel.heartbeat=4"])


def processes(mark: str) -> dict[int, dict[str, str]]:
    """Environments, by process id, of all living processes with `mark` in their command line (torchrun's sessions differ)."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            living = (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if living and mark in (folder / "cmdline").read_text():
                pairs = (folder / "environ").read_text().split("\0")
                found[int(folder.name)] = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def parent(pid: int) -> int | None:
    """None where the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


class Training:
    """A training without end that is in the middle of its steps."""

    def __init__(self, recipe: Path, folder: Path, world_size: int, overrides: list[str]) -> None:
        self.mark = f"run.dir={folder / 'run'}"
        endless = ["training.steps=1000000", "checkpoint.every=0", "validation.every=0"]
        self.job = Job(world_size, ["-m", "bd3_scale.train", str(recipe), self.mark, *endless, *overrides], folder / "log")
        end, metrics = time.monotonic() + 120, folder / "run" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            assert self.job.process.poll() is None and time.monotonic() < end, self.job.log.read_text()[-4000:]
            time.sleep(0.05)

    def send(self, rank: int, number: signal.Signals) -> int:
        of_rank = [pid for pid, environment in processes(self.mark).items() if environment.get("RANK") == str(rank)]
        # What a rank forks looks like the rank itself until it has begun something else.
        (pid,) = [pid for pid in of_rank if parent(pid) not in {None, *of_rank}]
        os.kill(pid, number)
        return pid

    def finish(self, timeout: float) -> Finished:
        """The end of the job, which comes by itself, together with that of all its processes."""
        finished, end = self.job.wait(timeout), time.monotonic() + 15
        while (left := processes(self.mark)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left, finished.output[-4000:]
        return Finished(finished.status, self.job.log.read_text())  # ranks may outlive a launcher that was killed

    def clear(self) -> None:
        for pid in processes(self.mark):
            os.kill(pid, signal.SIGKILL)
        self.job.process.wait()
        give_turn()


@pytest.fixture
def training(recipe: Path, tmp_path: Path, request: pytest.FixtureRequest):
    started = Training(recipe, tmp_path, *request.param)
    yield started
    started.clear()


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if "bd3_scale: error:" in line]


@pytest.mark.parametrize(("training", "rank"), [((n, keys), rank) for n, keys, rank in KILLED.values()], ids=KILLED, indirect=["training"])
def test_killed_rank_is_named(training: Training, rank: int) -> None:
    pid = training.send(rank, signal.SIGKILL)
    finished = training.finish(60)
    assert finished.status != 0
    lines = errors(finished.output)
    assert lines, finished.output[-4000:]
    assert all(re.search(rf"error: rank {rank} \(host .*, pid {pid}, last heard of at step \d+\) is gone", line) for line in lines), lines
    assert "Traceback" not in finished.output.split("bd3_scale: error:")[0], finished.output[-4000:]


@pytest.mark.parametrize("training", [TWO], indirect=True, ids=["two ranks"])
def test_stopped_rank_is_named(training: Training) -> None:
    """Its sockets stay open, so no collective fails: only the heartbeat can tell. Woken up, it finds that it is out."""
    pid = training.send(1, signal.SIGSTOP)
    end = time.monotonic() + 60
    while not errors(training.job.log.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    training.send(1, signal.SIGCONT)  # else torchrun gives it 30 s before SIGKILL
    finished = training.finish(60)
    assert finished.status != 0
    lines = errors(finished.output)
    assert lines and all("rank 1 (host" in line and f"pid {pid}" in line and "has not answered for 4 s" in line for line in lines), lines


@pytest.mark.parametrize("training", [TWO], indirect=True, ids=["two ranks"])
def test_killed_launcher_leaves_no_process(training: Training) -> None:
    """kill -9 of torchrun, which holds the store: the ranks, healthy, would train on where nobody sees them."""
    training.job.process.kill()
    finished = training.finish(60)
    assert any("the store by which the ranks found each other does not answer" in line for line in errors(finished.output)), finished


HANG = """
import os, sys
from bd3_scale import train
from bd3_scale.fault_tolerance import hang_watchdog
from bd3_scale.training.trainer import Trainer
hang_watchdog.LEAST = 5.0
whole = Trainer.update
def waiting_for_nothing():
    import threading
    threading.Event().wait()
def update(self):
    if os.environ["RANK"] == "1" and self.step == 15:
        waiting_for_nothing()
    return whole(self)
Trainer.update = update
sys.exit(train.main())
"""


def test_hang_ends_with_the_stacks_of_all_ranks(recipe: Path, tmp_path: Path) -> None:
    """The processes live and answer: only their main threads wait, one for nothing, the other for that one. How long that may be
    follows from the steps before: `parallel.timeout` is half an hour here. The rank that the others wait for is named."""
    script, run = tmp_path / "hang.py", tmp_path / "run"
    script.write_text(HANG)
    job = Job(
        2, [str(script), str(recipe), f"run.dir={run}", "parallel.timeout=1800", "parallel.hang=10", "validation.every=0"], tmp_path / "log"
    )
    finished = job.wait(200)
    assert finished.status != 0
    lines = errors(finished.output)
    assert lines and all("has done nothing for" in line and f"stacks of all ranks are in {run / 'stacks'}" in line for line in lines), lines
    assert all(re.search(r"the others wait for rank 1 \(host .*\), behind them", line) for line in lines), lines
    stacks = [(run / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "waiting_for_nothing" in stacks[1] and "waiting_for_nothing" not in stacks[0]
    assert json.loads((run / "heartbeat.json").read_text())["step"] <= 15
