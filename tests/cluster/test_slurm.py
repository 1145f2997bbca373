"""A run submitted to a real SLURM by `bd3_scale.launch`, preempted twice, is the undisturbed run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cluster import slurm as local
from tests.distributed.conftest import metrics
from tests.distributed.launch import ROOT, give_turn, launch, take_turn

reason = local.missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")

COMMON = ["training.steps=360", "checkpoint.every=30", "validation.every=120", "parallel.micro_batch=1", "tracking.every=1"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[local.Slurm]:
    take_turn(4)
    with local.cluster() as found:
        yield found
    give_turn()


def submit(slurm: local.Slurm, recipe: Path, run: Path, *words: str) -> tuple[int, Path]:
    """(the job's number, its output) of a run on two nodes of one process each."""
    command = [sys.executable, "-m", "bd3_scale.launch", "slurm", str(recipe), f"run.dir={run}", *words]
    command += ["--nodes", "2", "--gpus-per-node", "0", "--cpus-per-node", "1", "--grace", "60", "--wait", "60", "--time", "10"]
    command += ["--env", "OMP_NUM_THREADS=1", "--env", f"PYTHONPATH={ROOT}", "--setup", "ulimit -c 0"]
    done = subprocess.run(command, cwd=ROOT, env=slurm.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    number = int(re.search(r"Submitted batch job (\d+)", done.stdout)[1])  # type: ignore[index]
    return number, Path(f"{run}-logs") / f"{number}.out"


def wait(slurm: local.Slurm, number: int, true: Callable[[dict[str, str]], bool], output: Path, seconds: float = 300) -> dict[str, str]:
    """The job's state once it is what is waited for."""
    end = time.monotonic() + seconds
    while not true(job := slurm.job(number)):
        said = output.read_text()[-4000:] if output.exists() else "nothing"
        assert time.monotonic() < end, f"{job}\n{said}\n{slurm.words()}"
        time.sleep(0.3)
    return job


def trained(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count('"train"') if file.exists() else 0


def test_preempted_job_is_requeued_and_is_the_undisturbed_run(slurm: local.Slurm, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run with 'odd' name"
    number, output = submit(slurm, recipe, run, *COMMON)
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"]
    # The first is what --signal=B:USR1@60 does before the limit; the second a preemption by another job.
    for attempt, (steps, disturb) in enumerate([(20, ["scancel", "--signal=USR1", "--batch", str(number)]), (60, urgent)]):
        wait(slurm, number, lambda job, steps=steps: job["JobState"] == "RUNNING" and trained(run) >= steps, output)  # type: ignore[misc]
        slurm(*disturb)
        wait(slurm, number, lambda job, attempt=attempt: int(job["Restarts"]) > attempt, output)  # type: ignore[misc]
        heartbeat = json.loads((run / "heartbeat.json").read_text())
        assert heartbeat["doing"] == "stopped" and heartbeat["world_size"] == 2 and steps <= heartbeat["step"] < 360, heartbeat
        # Nothing was lost: the last step is the newest checkpoint.
        assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{heartbeat['step']:08d}"
    job = wait(slurm, number, lambda job: job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), output)
    said = output.read_text()
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "2", "0:0"), said[-6000:]
    assert said.count("not finished: back into the queue") == 2 and said.count("the run is finished") == 1
    for attempt in range(3):  # what each rank said is kept apart
        assert len(list((Path(f"{run}-logs") / f"{number}-{attempt}").rglob("stderr.log"))) == 2

    finished = launch(2, ["-m", "bd3_scale.train", str(recipe), f"run.dir={tmp_path / 'whole'}", *COMMON], tmp_path / "log")
    assert finished.status == 0, finished.output[-4000:]
    for kind, key in (("train", "loss"), ("train", "gradient_norm"), ("validation", "nelbo")):
        found, expected = (
            [(line["step"], line[key]) for line in metrics(folder) if line["kind"] == kind] for folder in (run, tmp_path / "whole")
        )
        assert len(expected) == (360 if kind == "train" else 3)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_job_that_cannot_work_is_not_requeued(slurm: local.Slurm, recipe: Path, tmp_path: Path) -> None:
    """It fails with the line that names the cause, after its restarts in place, and the queue is free."""
    run = tmp_path / "run"
    number, output = submit(slurm, recipe, run, "data.path=/nowhere", "--restarts", "0")
    job = wait(slurm, number, lambda job: job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), output)
    said = output.read_text()
    assert job["JobState"] == "FAILED" and job["Restarts"] == "0", job
    assert "data.path=/nowhere" in said and "not requeued" in said, said[-4000:]


def test_odd_words_reach_slurm_as_they_are(slurm: local.Slurm, recipe: Path, tmp_path: Path) -> None:
    """sbatch reads #SBATCH lines with rules of its own."""
    name, touched = "a 'b' \"c\" $(touch INJECTED) # d \\ %j", tmp_path / "INJECTED"
    words = ["--name", name, "--sbatch-option", "hold", "--env", f"X=$(touch {touched})`touch {touched}`"]
    number, _ = submit(slurm, recipe, tmp_path / "run", *words)
    shown = slurm("scontrol", "show", "job", str(number))
    slurm("scancel", str(number))
    assert f"JobName={name}\n" in shown
    assert not touched.exists() and not (ROOT / "INJECTED").exists()
