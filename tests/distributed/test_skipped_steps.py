"""A step whose gradient is not a number, or far above those before, is left out by every layout alike, and the run goes on as if it had
not been: neither weights nor Adam's clock know of it, nor does a run that is continued."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.conftest import metrics
from tests.distributed.forked import run_ranks
from tests.distributed.launch import ALL

POISON = """
import sys
from bd3_scale.objectives.table import BlockDiffusion
from bd3_scale.optimizers import adamw
from bd3_scale.training.trainer import Trainer
from tests.distributed import worker
adamw.REMEMBERED = 8  # a norm is compared with four others or more
clean = BlockDiffusion.training_inputs
def poisoned(self, rows, slots, step, seed, global_batch):
    inputs = clean(self, rows, slots, step, seed, global_batch)
    if step in (5, 6) and 3 in slots:  # one row of the global batch, so one rank
        inputs.weights.mul_(float("inf"))
    if step == 9 and 3 in slots:
        inputs.weights.mul_(1e4)
    return inputs
BlockDiffusion.training_inputs = poisoned
close = Trainer.close
def closing(self):
    clocks = {float(state["step"]) for state in self.engine.adam.state.values()}
    assert clocks == {{8: 6.0, 12: 9.0}[self.step]}, clocks
    close(self)
Trainer.close = closing
worker.main()
"""
BF16, DEEPSPEED = "training.precision=bf16", "parallel.engine=deepspeed"
LAYOUTS = {
    "one": (1, []),
    "deepspeed": (1, [DEEPSPEED]),
    "one, continued": (1, []),
    "deepspeed, continued": (1, [DEEPSPEED]),
    "zero 1": (2, []),
    "zero 1, bf16, continued": (2, [BF16]),
    "zero 1, bf16": (2, [BF16]),
    "deepspeed, zero 0": (2, ["parallel.zero=0", DEEPSPEED]),
    "deepspeed, zero 1": (2, [DEEPSPEED]),
    "deepspeed, zero 1, bf16": (2, [DEEPSPEED, BF16]),
    "zero 2, bf16": (2, ["parallel.zero=2", BF16]),
    "zero 3, bf16": (2, ["parallel.zero=3", BF16]),
    "tensor, zero 3": (2, ["parallel.tensor=2", "parallel.zero=3"]),
    "zero 3": (2, ["parallel.zero=3"]),
    "zero 2": (2, ["parallel.zero=2"]),
    "zero 0": (2, ["parallel.zero=0"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "tensor, bf16": (2, ["parallel.tensor=2", "training.precision=bf16"]),
    "fsdp, zero 2": (2, ["parallel.zero=2", "parallel.engine=fsdp"]),
    "pipeline, zero 3, bf16": (2, ["parallel.pipeline=2", "parallel.zero=3", "training.precision=bf16"]),
    "pipeline, bf16": (2, ["parallel.pipeline=2", "training.precision=bf16"]),
}

SAID_BY_OTHERS = {
    "zero 1, bf16", "deepspeed, zero 0", "deepspeed, zero 1", "zero 2, bf16", "zero 3, bf16", "zero 2", "tensor, bf16", "pipeline, bf16",
    "deepspeed, zero 1, bf16", "fsdp, zero 2", "zero 1",
}  # fmt: skip
"""Trained with `BD3_ALL_LAYOUTS=1` only."""
assert LAYOUTS.keys() >= SAID_BY_OTHERS
TRAINED = {name: one for name, one in LAYOUTS.items() if ALL or name not in SAID_BY_OTHERS}


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipped")
    (folder / "poison.py").write_text(POISON)
    for world_size in (1, 2):
        plan = folder / f"plan-{world_size}.json"
        items = {name: overrides for name, (size, overrides) in TRAINED.items() if size == world_size}
        common = ["training.steps=12", "training.spike_deviations=50", "checkpoint.every=0", "validation.every=0"]
        runs = [[f"run.dir={folder / name}", *common, *overrides] for name, overrides in items.items()]
        halves = [[*overrides, "training.steps=8"] for name, overrides in zip(items, runs, strict=True) if "continued" in name]
        plan.write_text(json.dumps([(str(recipe), overrides) for overrides in halves + runs]))
        finished = run_ranks(world_size, [str(folder / "poison.py"), str(plan)], plan.with_suffix(".log"), timeout=300)
        assert finished.status == 0, finished.output[-6000:]
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_every_layout_leaves_out_the_same_steps(runs: Path, name: str) -> None:
    ours, theirs = ([line for line in metrics(runs / run) if line["kind"] == "train"] for run in (name, "one"))
    assert [line["skipped_steps"] for line in ours] == [0] * 5 + [1] + [2] * 3 + [3] * 3
    assert [line["skipped_in_a_row"] for line in ours] == [0] * 5 + [1, 2, 0, 0, 1, 0, 0]
    good = [place for place in range(12) if place not in (5, 6, 9)]
    found, expected = (np.array([lines[place]["loss"] for place in good]) for lines in (ours, theirs))
    assert np.isfinite(expected).all() and np.abs(found / expected - 1).max() < (1e-2 if "bf16" in name else 1e-5)
