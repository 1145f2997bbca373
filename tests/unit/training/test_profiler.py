"""The profile of chosen steps on chosen ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from bd3_scale.recipe.schema import TrackingConfig
from bd3_scale.training.profiler import StepProfiler

CPU = torch.device("cpu")


def walk(profiler: StepProfiler, steps: range) -> None:
    for step in steps:
        profiler.before(step)
        with torch.profiler.record_function(f"update {step}"):
            torch.ones(3).sum()
    profiler.close()
    profiler.close()


def names(path: Path) -> set[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if str(event.get("name", "")).startswith("update")}


def test_the_steps_that_were_asked_for_are_traced(tmp_path: Path) -> None:
    config = TrackingConfig(profile=[2, 3], profile_ranks=[0, 5])
    walk(StepProfiler(config, 5, CPU, tmp_path), range(6))
    assert names(tmp_path / "steps_2-3_rank_5.json.gz") == {"update 2", "update 3"}
    walk(StepProfiler(config, 1, CPU, tmp_path), range(6))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_that_ends_inside_keeps_what_it_has(tmp_path: Path) -> None:
    walk(StepProfiler(TrackingConfig(profile=[1, 9]), 0, CPU, tmp_path), range(3))
    assert names(tmp_path / "steps_1-9_rank_0.json.gz") == {"update 1", "update 2"}
    walk(StepProfiler(TrackingConfig(profile=[1, 9]), 0, CPU, tmp_path / "later"), range(4, 8))  # it was continued behind the first
    assert not (tmp_path / "later").exists()
