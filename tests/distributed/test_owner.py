"""Two jobs in one run directory: the second is refused while the first lives; one that was succeeded touches nothing any more."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.conftest import metrics
from tests.distributed.launch import Job

QUICK = """
import sys
from bd3_scale.fault_tolerance import run_owner
run_owner.LEASE, run_owner.BEAT = 12.0, 0.5
from bd3_scale import train
sys.exit(train.main(sys.argv[1:]))
"""
COMMON = ["validation.every=0", "validation.rows=2", "checkpoint.every=4", "checkpoint.keep=2"]


class Jobs:
    """Submissions into one directory."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        self.folder, self.run, self.jobs = folder, folder / "run", list[Job]()
        (folder / "quick.py").write_text(QUICK)
        self.arguments = [str(folder / "quick.py"), str(recipe), f"run.dir={self.run}", *COMMON]

    def submit(self, steps: int) -> Job:
        job = Job(1, [*self.arguments, f"training.steps={steps}"], self.folder / f"{len(self.jobs)}.log")
        self.jobs.append(job)
        return job

    def steps(self) -> list[int]:
        file = self.run / "metrics.jsonl"
        return [line["step"] for line in metrics(self.run) if line["kind"] == "train"] if file.exists() else []

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 120
        while not self.steps() or self.steps()[-1] < step:
            assert self.jobs[0].process.poll() is None and time.monotonic() < end, self.jobs[0].log.read_text()[-3000:]
            time.sleep(0.05)

    def content(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.run)): path.read_bytes() for path in sorted(self.run.rglob("*")) if path.is_file()}


@pytest.fixture
def jobs(recipe: Path, tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(recipe, tmp_path)
    yield made
    for job in made.jobs:
        if job.process.poll() is None:
            job.kill()


def test_a_second_job_is_refused_then_takes_over_and_the_first_leaves_it_alone(jobs: Jobs) -> None:
    first = jobs.submit(1_000_000)
    jobs.wait_for_step(6)
    refused = jobs.submit(40).wait(100)
    assert refused.status == 2 and refused.output.count("bd3_scale: error:") == 1
    assert "belongs to another job (host" in refused.output and "which lives" in refused.output
    jobs.wait_for_step(jobs.steps()[-1] + 4)

    first.process.send_signal(signal.SIGSTOP)
    end = max(40, jobs.steps()[-1] + 10)
    second = jobs.submit(end).wait(100)
    assert second.status == 0, second.output[-3000:]
    assert "taking over from another job" in second.output
    assert jobs.steps() == list(range(1, end + 1))

    before = jobs.content()
    first.process.send_signal(signal.SIGCONT)
    ended = first.wait(60)
    assert ended.status == 1 and "owns" in ended.output and "leaves the directory as it is" in ended.output, ended.output[-3000:]
    assert jobs.content() == before and "Traceback" not in ended.output
