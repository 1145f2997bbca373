"""A rank that is slow is seen, although all ranks of a step end it together. (Who is named, and when: test_pace.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.conftest import metrics
from tests.distributed.forked import run_ranks
from tests.distributed.launch import ALL


@pytest.mark.parametrize("zero", [1, 3] if ALL else [3])
def test_a_slow_rank_is_seen(recipe: Path, tmp_path: Path, zero: int) -> None:
    overrides = [f"run.dir={tmp_path / 'run'}", f"parallel.zero={zero}", "training.steps=6", "validation.every=0", "checkpoint.every=0"]
    finished = run_ranks(2, ["tests/distributed/pace_worker.py", str(recipe), *overrides], tmp_path / "log")
    assert finished.status == 0, finished.output[-4000:]
    lines = metrics(tmp_path / "run")
    measured = [line["own_seconds"] for line in lines if line["kind"] == "train" and line["step"] > 1]
    assert measured and all(one["most"] > 0.2 for one in measured), "two layers and more of 0.1 s"
    assert all(0 < one["least"] <= one["median"] <= one["most"] for one in measured)
