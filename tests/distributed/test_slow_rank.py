"""A rank that is slow is seen, and named, although all ranks of a step end it together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.conftest import metrics
from tests.distributed.forked import run_ranks


@pytest.mark.parametrize("zero", [1, 3])
def test_a_slow_rank_is_named_once(recipe: Path, tmp_path: Path, zero: int) -> None:
    overrides = [f"run.dir={tmp_path / 'run'}", f"parallel.zero={zero}", "training.steps=6", "validation.every=0", "checkpoint.every=0"]
    finished = run_ranks(2, ["tests/distributed/pace_worker.py", str(recipe), *overrides], tmp_path / "log")
    assert finished.status == 0, finished.output[-4000:]
    lines = metrics(tmp_path / "run")
    (warning,) = [line["text"] for line in lines if line["kind"] == "warning"]
    assert warning.startswith("rank 1 on host ") and "is slow" in warning
    measured = [line["own_seconds"] for line in lines if line["kind"] == "train" and line["step"] > 1]
    assert all(one["most"] > 0.2 and one["most"] > one["least"] + 0.15 for one in measured), "two layers and more of 0.1 s"
