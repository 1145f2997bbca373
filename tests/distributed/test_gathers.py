"""Weights that are gathered behind a forward: nothing computes with what is not there yet, and nothing waits for what it does not need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.forked import run_ranks

LAYOUTS = {
    "fp32": ["model.layers=4"],
    "bf16": ["model.layers=4", "training.precision=bf16"],
    "tied, adaln, positions": ["model.tied_head=true", "model.conditioning=adaln", "model.positions=learned"],
}


@pytest.fixture(scope="module")
def found(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gathers")
    plan, out = folder / "plan.json", folder / "out.json"
    plan.write_text(json.dumps([(name, str(recipe), overrides) for name, overrides in LAYOUTS.items()]))
    finished = run_ranks(2, ["tests/distributed/gathers_worker.py", str(plan), str(out)], folder / "log", timeout=300)
    assert finished.status == 0, finished.output[-6000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_everything_waits_for_its_weights(found: dict[str, Any], name: str) -> None:
    for late, usual in zip(found[f"{name}: late"], found[f"{name}: as it is"], strict=True):
        assert len(late) >= 19 and np.isfinite(late).all()
        np.testing.assert_allclose(late, usual, rtol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gathers_are_behind_the_forward(found: dict[str, Any], name: str) -> None:
    for rank in found[f"{name}: order"]:
        assert rank["after"] == rank["buckets"] > 3, "all are sent on their way by the step"
        own, others = zip(*rank["seen"], strict=True)
        assert set(own) == {0}, "a block's own are there"
        assert others[0] > 0 and list(others) == sorted(others, reverse=True), "those of later parts still come"
        assert rank["hooked"] == 0, "blocks are compiled with their hooks"


def test_a_part_that_does_not_wait_is_noticed(found: dict[str, Any]) -> None:
    for rank in found["fp32: order"]:
        assert rank["noticed"] == "a part of the network did not wait for its weights"
