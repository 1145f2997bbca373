"""A tiny recipe and its data, shared by all distributed tests of a session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.forked import run_ranks
from tests.invented import prepare_filled, prepare_invented

# initial_std is 1 / sqrt(hidden): with 0.02 a network this narrow is so ill-conditioned that, within 20 steps, the order of a
# sum on one process (micro_batch 2 or 4) was seen to change a gradient norm by a tenth while the loss agreed to 1e-6.
RECIPE = """
run: {name: tiny, dir: unset, seed: 7}
model: {context: 32, layers: 2, hidden: 32, heads: 4, key_value_heads: 2, dropout: 0.1, initial_std: 0.18}
objective: {block_size: 8}
data: {path: DATA, tokenizer: bytes, window: 2}
training: {steps: 20, global_batch: 8, learning_rate: 3.0e-3, warmup: 5, weight_decay: 0.01, clip: 0.5, ema: 0.9}
validation: {every: 10, rows: 10}
parallel: {zero: 1, micro_batch: 2, timeout: 120}
checkpoint: {every: 10, keep: 0}
tracking: {every: 1, plots: false}
"""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with rows of 32 bytes."""
    return prepare_invented(tmp_path_factory.mktemp("data") / "tiny", 32)


@pytest.fixture(scope="session")
def filled_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with a text in each row of 32 bytes, of which the rest does not count."""
    return prepare_filled(tmp_path_factory.mktemp("data") / "filled", 32)


@pytest.fixture(scope="session")
def recipe(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE.replace("DATA", str(tiny_data)))
    return path


def train_all(world_size: int, recipe: Path, runs: dict[Path, list[str]], folder: Path) -> dict[Path, list[dict]]:
    """Train every run (directory -> overrides) on `world_size` processes of one group; returns their metrics."""
    plan = folder / f"plan-{world_size}-{len(list(folder.iterdir()))}.json"
    plan.write_text(json.dumps([[str(recipe), [f"run.dir={run}", *overrides]] for run, overrides in runs.items()]))
    finished = run_ranks(world_size, ["tests/distributed/worker.py", str(plan)], plan.with_suffix(".log"), timeout=400)
    assert finished.status == 0, finished.output[-6000:]
    return {run: metrics(run) for run in runs}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
