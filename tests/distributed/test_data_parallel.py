"""Data parallelism and ZeRO: any number of ranks and any stage give the loss curve of one process, also after a resume.

Property 7 of objective.md, section 7, and issue 2: fp32, the same global batch, 1e-5 relative over 20 steps, with dropout,
clipping, weight decay, gradient accumulation and EMA at work.
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

STAGES = (0, 1, 2, 3)


def curve(lines: list[dict]) -> np.ndarray:
    """Loss of every step; fails where a step is missing or doubled."""
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, len(train) + 1))
    return np.array([line["loss"] for line in train])


def nelbos(lines: list[dict]) -> np.ndarray:
    return np.array([line["nelbo"] for line in lines if line["kind"] == "validation"])


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """All runs by name: "world/stage" from the start, "world/stage <- world/stage" continued from step 10."""
    folder = tmp_path_factory.mktemp("runs")
    results: dict[str, list[dict]] = {}

    def go(world_size: int, named: dict[str, list[str]]) -> None:
        paths = {folder / name.replace("/", "-").replace(" <- ", "_from_"): overrides for name, overrides in named.items()}
        for name, lines in zip(named, train_all(world_size, recipe, paths, folder).values(), strict=True):
            results[name] = lines

    def continued(name: str, source: str) -> None:
        """A copy of the run that stopped at step 10, to be continued under another name."""
        shutil.copytree(folder / source, folder / name.replace("/", "-").replace(" <- ", "_from_"))

    go(1, {"1/0": ["parallel.zero=0", "parallel.micro_batch=8"], "1/2": ["parallel.zero=2", "training.recompute=true"]})
    go(2, {f"2/{stage}": [f"parallel.zero={stage}", "training.steps=10"] for stage in STAGES})
    for stage in STAGES:
        continued(f"4/{(stage + 1) % 4} <- 2/{stage}", f"2-{stage}")
        continued(f"1/{(stage + 2) % 4} <- 2/{stage}", f"2-{stage}")
    go(
        4,
        {f"4/{stage}": [f"parallel.zero={stage}", "parallel.micro_batch=1"] for stage in STAGES}
        | {f"4/{(stage + 1) % 4} <- 2/{stage}": [f"parallel.zero={(stage + 1) % 4}"] for stage in STAGES},
    )
    go(1, {f"1/{(stage + 2) % 4} <- 2/{stage}": [f"parallel.zero={(stage + 2) % 4}"] for stage in STAGES})
    go(2, {f"2/{stage}": [f"parallel.zero={stage}"] for stage in STAGES})  # continued where they are
    return results


def test_every_layout_has_the_loss_curve_of_one_process(runs: dict[str, list[dict]]) -> None:
    reference = curve(runs["1/0"])
    assert len(reference) == 20
    assert reference[-1] < 0.9 * reference[0], "the reference does not learn: the comparison would say little"
    worst = {name: float(np.abs(curve(lines) / reference - 1).max()) for name, lines in runs.items()}
    print("\n".join(f"{name:14s} {error:.1e}" for name, error in worst.items()))
    assert max(worst.values()) < 1e-5, worst


def test_every_layout_has_the_validation_of_one_process(runs: dict[str, list[dict]]) -> None:
    reference = nelbos(runs["1/0"])
    assert len(reference) == 2
    worst = {name: float(np.abs(nelbos(lines) / reference - 1).max()) for name, lines in runs.items()}
    assert max(worst.values()) < 1e-5, worst


def test_gradient_norms_agree(runs: dict[str, list[dict]]) -> None:
    norms = {name: np.array([line["gradient_norm"] for line in lines if line["kind"] == "train"]) for name, lines in runs.items()}
    assert (norms["1/0"] > 0.5).any(), "clipping was never at work"
    worst = {name: float(np.abs(norm / norms["1/0"] - 1).max()) for name, norm in norms.items()}
    assert max(worst.values()) < 1e-3, worst


def test_killed_run_is_continued_by_the_same_command(recipe: Path, runs: dict[str, list[dict]], tmp_path: Path) -> None:
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
    assert np.abs(curve(metrics(run)) / curve(runs["1/0"]) - 1).max() < 1e-5


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
    finished = launch(2, ["-m", "bd3_scale.train", str(recipe), "training.global_batch=9"], tmp_path / "log", timeout=120)
    assert finished.status != 0
    assert sum("bd3_scale: error: training.global_batch = 9" in line for line in finished.output.splitlines()) == 1
