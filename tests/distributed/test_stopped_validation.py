"""A run that is asked to stop in the middle of a validation leaves it, and the continued run makes it first: nothing is missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.conftest import metrics
from tests.distributed.forked import run_ranks

STOP = """
import os, signal
from bd3_scale.training.validation import Validator
from tests.distributed import worker
whole, calls = Validator._part, []
def told(self, index):
    calls.append(index)
    if len(calls) == 3 and os.environ["RANK"] == "1":  # in the first validation, on one rank only
        os.kill(os.getpid(), signal.SIGTERM)
    return whole(self, index)
Validator._part = told
worker.main()
"""
LONG = ["validation.rows=240", "validation.every=5", "checkpoint.every=0", "training.steps=15", "parallel.micro_batch=1",
        "tuner.enabled=true", "tuner.every=5", "tuner.start_step=5", "tuner.margin=0", "objective.block_size=4"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "stop.py").write_text(STOP)
    for name, script, world_size, run in (
        ("whole", "tests/distributed/worker.py", 1, "whole"),
        ("stopped", str(folder / "stop.py"), 2, "stopped"),
        ("continued", "tests/distributed/worker.py", 1, "stopped"),
    ):
        plan = folder / f"{name}.json"
        plan.write_text(json.dumps([(str(recipe), [f"run.dir={folder / run}", *LONG])]))
        finished = run_ranks(world_size, [script, str(plan)], plan.with_suffix(".log"), timeout=200)
        assert finished.status == 0, finished.output[-6000:]
        if name == "stopped":
            kinds = [line["kind"] for line in metrics(folder / run)]
            assert kinds.count("train") == 5 and not kinds.count("validation"), "it did not stop inside of the validation"
    return folder


def test_the_unfinished_validation_and_its_tuning_are_made_up_for(folder: Path) -> None:
    whole, continued = (metrics(folder / run) for run in ("whole", "stopped"))
    for kind, key in (("train", "loss"), ("validation", "nelbo")):
        expected, found = ([(line["step"], line[key]) for line in lines if line["kind"] == kind] for lines in (whole, continued))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    intervals = [[(line["step"], line["interval"]) for line in lines if line["kind"] == "tuner"] for lines in (whole, continued)]
    assert intervals[0] == intervals[1] and len(intervals[0]) == 3
