"""The commands as a user starts them, alone and under torchrun: killed, stopped, with bad data, with ranks that disagree.

That every layout computes the same is in test_layouts.py, that any continues any other in test_elastic.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.conftest import metrics, train_all
from tests.distributed.launch import Job, launch

TUNED = ["tuner.enabled=true", "tuner.every=5", "tuner.start_step=5", "objective.block_size=4", "validation.rows=40"]


def curve(lines: list[dict]) -> np.ndarray:
    """Loss of every step; fails where a step is missing or doubled."""
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, len(train) + 1))
    return np.array([line["loss"] for line in train])


def test_killed_run_is_continued_by_the_same_command(recipe: Path, tmp_path: Path) -> None:
    """kill -9 of two ranks between a checkpoint and its successor; the same command on one process goes on."""
    run = tmp_path / "killed"
    command = ["-m", "bd3_scale.train", str(recipe), f"run.dir={run}", "parallel.zero=3", "checkpoint.every=3"]
    job = Job(2, command, tmp_path / "killed.log")
    end = time.monotonic() + 200
    while not (run / "checkpoints" / "latest").exists() or metrics_length(run) < 8:
        assert job.process.poll() is None and time.monotonic() < end, job.log.read_text()[-4000:]
        time.sleep(0.02)
    job.kill()
    finished = launch(1, command, tmp_path / "continued.log")
    assert finished.status == 0, finished.output[-4000:]
    assert "sign of life" not in finished.output, "the directory of a dead process is taken over without a wait"
    whole = train_all(1, recipe, {tmp_path / "whole": []}, tmp_path)
    assert np.abs(curve(metrics(run)) / curve(whole[tmp_path / "whole"]) - 1).max() < 1e-5


def metrics_length(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_sigterm_saves_on_an_agreed_step_and_leaves_with_success(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    command = ["-m", "bd3_scale.train", str(recipe), f"run.dir={run}", "training.steps=100000", "checkpoint.every=0", "validation.every=0"]
    job = Job(2, command, tmp_path / "stopped.log")
    end = time.monotonic() + 200
    while metrics_length(run) < 3:
        assert job.process.poll() is None and time.monotonic() < end, job.log.read_text()[-4000:]
        time.sleep(0.05)
    os.kill(job.process.pid, signal.SIGTERM)  # torchrun hands it on to the ranks
    finished = job.wait(60)
    latest = (run / "checkpoints" / "latest").read_text().strip()
    steps = [line["step"] for line in metrics(run)]
    assert latest == f"step_{steps[-1]:08d}", (latest, steps[-1], finished.output[-2000:])
    assert "stopped by" in finished.output


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_bad_shard_is_one_clear_line_and_no_success(recipe: Path, tiny_data: Path, tmp_path: Path, damage: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    shard = sorted((data / "train").glob("*.mds"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flipped" else content[:-10])
    command = ["-m", "bd3_scale.train", str(recipe), f"run.dir={tmp_path / 'run'}", f"data.path={data}"]
    finished = launch(2 if damage == "flipped" else 1, command, tmp_path / "log", timeout=120)
    assert finished.status != 0
    lines = [line for line in finished.output.splitlines() if "bd3_scale: error:" in line]
    assert lines and all(shard.name in line for line in lines), finished.output[-3000:]
    assert "Traceback" not in finished.output.split("bd3_scale: error:")[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_wrong_world_size_ends_before_any_process_group(recipe: Path, tmp_path: Path) -> None:
    finished = launch(2, ["-m", "bd3_scale.train", str(recipe), "training.global_batch=1"], tmp_path / "log", timeout=120)
    assert finished.status != 0
    assert sum("bd3_scale: error: training.global_batch = 1" in line for line in finished.output.splitlines()) == 1


def test_ranks_that_disagree_on_the_interval_abort(recipe: Path, tmp_path: Path) -> None:
    script = tmp_path / "disagree.py"
    script.write_text(
        "import sys\n"
        "from bd3_scale import train\n"
        "from bd3_scale.distributed.layout import Layout\n"
        "from bd3_scale.tuning.interval_tuner import Choice\n"
        "heard = Layout.broadcast\n"
        "def misheard(self, value):\n"
        "    value = heard(self, value)\n"
        "    return Choice((0.3, 0.8), 1.0, True) if self.rank == 1 and isinstance(value, Choice) else value\n"
        "Layout.broadcast = misheard\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    arguments = [str(script), str(recipe), f"run.dir={tmp_path / 'run'}", *TUNED]
    finished = launch(2, arguments, tmp_path / "log", timeout=120)
    assert finished.status != 0
    assert any("bd3_scale: error:" in line and "different intervals" in line for line in finished.output.splitlines()), finished.output[
        -3000:
    ]


# Modulations start at 0, and with them the gradients of what they gate: with the usual epsilon Adam would blow up rounding errors.
TIMED = ["model.conditioning=adaln", "training.epsilon=1e-4"]
SYSTEMS = {"ar": [], "mdlm": [], "sedd": TIMED, "ssdlm": TIMED}
SAMPLERS = {"sedd": ["--sampler", "analytic", "--steps", "8"], "ssdlm": ["--steps", "3"]}


def test_the_other_systems_learn_continue_exactly_and_are_sampled(recipe: Path, tmp_path: Path) -> None:
    """In one piece and in two: the same numbers, bit for bit. Then texts of more than the context."""
    runs = {kind: [f"objective.kind={kind}", "objective.block_size=null", *more] for kind, more in SYSTEMS.items()}
    whole = {tmp_path / kind: overrides for kind, overrides in runs.items()}
    halves = {tmp_path / f"{kind}-in-two": overrides for kind, overrides in runs.items()}
    found = train_all(1, recipe, whole | {run: [*overrides, "training.steps=10"] for run, overrides in halves.items()}, tmp_path)
    parts = train_all(1, recipe, halves, tmp_path)
    for kind in SYSTEMS:
        ours, theirs = found[tmp_path / kind], parts[tmp_path / f"{kind}-in-two"]
        np.testing.assert_array_equal(curve(ours), curve(theirs))
        held_out = "cross_entropy" if kind == "ssdlm" else "nelbo"
        bounds = [[(line["step"], line[held_out]) for line in lines if line["kind"] == "validation"] for lines in (ours, theirs)]
        assert bounds[0] == bounds[1] and [step for step, _ in bounds[0]] == [10, 20]
        assert curve(ours)[-4:].mean() < curve(ours)[:4].mean() - 0.5 and bounds[0][1][1] < bounds[0][0][1]
        options = ["--length", "40", "--ignore-eos", "--json", *SAMPLERS.get(kind, [])]
        finished = launch(1, ["-m", "bd3_scale.sample", str(tmp_path / kind), *options], tmp_path / f"{kind}.log", timeout=120)
        assert finished.status == 0 and '"stop": "length"' in finished.output, finished.output[-3000:]
