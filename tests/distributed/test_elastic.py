"""Any layout to any other: 10 steps in one, saved, 10 more in another, are the 20 steps of one process, in the middle of a ramp.

Eighteen layouts on up to four processes, of a model with everything that stages and tensor ranks share (tied embeddings, the
noise condition, key heads), and two with Muon. Every other one writes a checkpoint, and the one after it continues that
(three pairs of ten with `BD3_ALL_LAYOUTS=1` only; `BD3_ALL_PAIRS=1`: all write, and each continues each of its optimizer, a quarter of
an hour). tests/unit/checkpoint/test_layouts.py holds all pairs to the bit, without training.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.conftest import metrics
from tests.distributed.forked import run_ranks
from tests.distributed.launch import ALL

pytestmark = pytest.mark.timeout(20000 if os.environ.get("BD3_ALL_PAIRS") else 1200)
COMMON = [
    "model.layers=4", "model.conditioning=adaln", "model.tied_head=true", "model.head_bias=true", "training.epsilon=1e-4",
    "training.global_batch=[[0,4],[20,8],[90,12]]",  # 8 rows from step 5, 12 from step 14 on
    "validation.rows=8", "tuner.enabled=true", "tuner.every=5", "tuner.start_step=5", "tuner.margin=0", "checkpoint.every=0",
]  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "1, zero 1": (1, {}),
    "tensor 2, pipeline 2 x 2, sequence": (4, {"tensor": 2, "pipeline": 2, "virtual_stages": 2, "sequence": "true"}),
    "data 2, zero 2": (2, {"zero": 2}),
    "tensor 4": (4, {"tensor": 4, "micro_batch": "null"}),
    "pipeline 2": (2, {"pipeline": 2}),
    "data 4, zero 3": (4, {"zero": 3}),
    "1, zero 3": (1, {"zero": 3}),
    "tensor 2, data 2, sequence, zero 2": (4, {"tensor": 2, "sequence": "true", "zero": 2, "micro_batch": "null"}),
    "pipeline 2 x 2, zero 0": (2, {"pipeline": 2, "virtual_stages": 2, "zero": 0}),
    "data 4, zero 0": (4, {"zero": 0}),
    "tensor 2, sequence, zero 3": (2, {"tensor": 2, "sequence": "true", "zero": 3, "micro_batch": "null"}),
    "pipeline 2, data 2, zero 3": (4, {"pipeline": 2, "zero": 3}),
    "data 4, fsdp, shard 2, zero 3": (4, {"engine": "fsdp", "shard": 2, "zero": 3}),
    "pipeline 2, data 2": (4, {"pipeline": 2}),
    "context 2, zero 3": (2, {"context": 2, "zero": 3}),
    "1, zero 0": (1, {"zero": 0}),
    "1, zero 2": (1, {"zero": 2}),
    "context 4": (4, {"context": 4}),
    "muon: data 4, zero 3": (4, {"zero": 3}),
    "muon: tensor 2, sequence": (2, {"tensor": 2, "sequence": "true", "micro_batch": "null"}),
}
NAMES = list(LAYOUTS)
WHOLE = {"adamw": "whole", "muon": "whole_muon"}
"""The uninterrupted run of one process, by optimizer."""


def optimizer(name: str) -> str:
    return "muon" if name.startswith("muon") else "adamw"


PAIRS = list(zip(NAMES[::2], NAMES[1::2], strict=True))
if not ALL:
    PAIRS = [pair for pair in PAIRS if pair[0] not in ("pipeline 2", "1, zero 3", "pipeline 2 x 2, zero 0")]
if os.environ.get("BD3_ALL_PAIRS"):
    PAIRS = [pair for pair in itertools.product(NAMES, NAMES) if len(set(map(optimizer, pair))) == 1]
SOURCES = list(dict.fromkeys(source for source, _ in PAIRS))


def slug(*names: str) -> str:
    """A folder's name that means nothing in YAML."""
    return re.sub(r"[^\w]+", "_", "_to_".join(names))


def overrides(run: Path, name: str, steps: int) -> list[str]:
    layout = [f"parallel.{key}={value}" for key, value in LAYOUTS[name][1].items()]
    return [f"run.dir={run}", *COMMON, f"training.steps={steps}", f"training.optimizer={optimizer(name)}", *layout]


@pytest.fixture(scope="module")
def folder(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")

    def go(world_size: int, items: list[tuple[list[str], str]]) -> None:
        plan = folder / f"plan-{world_size}-{len(list(folder.iterdir()))}.json"
        plan.write_text(json.dumps([(str(recipe), overrides, action) for overrides, action in items]))
        finished = run_ranks(world_size, ["tests/distributed/elastic_worker.py", str(plan)], plan.with_suffix(".log"), timeout=3000)
        assert finished.status == 0, finished.output[-6000:]

    def of(world_size: int) -> list[str]:
        return [name for name in SOURCES if LAYOUTS[name][0] == world_size]

    def first(world_size: int) -> list[tuple[list[str], str]]:
        return [(overrides(folder / slug(name), name, 10), "train") for name in of(world_size)]

    def then(world_size: int) -> list[tuple[list[str], str]]:
        items = []
        for source, target in PAIRS:
            if LAYOUTS[target][0] == world_size:
                items.append((overrides(folder / slug(source, target), target, 20), "train"))
        for name in of(world_size):
            shutil.copytree(folder / slug(name), folder / f"{slug(name)}-before")
            items.append((overrides(folder / slug(name), name, 10), "resave"))
        return items

    whole = [([*overrides(folder / run, NAMES[0], 20), f"training.optimizer={one}"], "train") for one, run in WHOLE.items()]
    go(1, whole + first(1))
    go(2, first(2))
    go(4, first(4))
    for source, target in PAIRS:
        shutil.copytree(folder / slug(source), folder / slug(source, target))
    for world_size in (1, 2, 4):
        go(world_size, then(world_size))
    return folder


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_continued_in_another_layout_is_the_uninterrupted_run(folder: Path, source: str, target: str) -> None:
    expected, found = metrics(folder / WHOLE[optimizer(source)]), metrics(folder / slug(source, target))
    for kind, keys in (("train", ("loss", "gradient_norm", "data_tokens")), ("validation", ("nelbo",))):
        ours, theirs = ([line for line in lines if line["kind"] == kind] for lines in (found, expected))
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for key in keys:
            worst = np.abs(np.array([line[key] for line in ours]) / [line[key] for line in theirs] - 1).max()
            assert worst < 1e-5, (kind, key, worst)
    chosen = [[(line["step"], line["interval"]) for line in lines if line["kind"] == "tuner"] for lines in (found, expected)]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 4


@pytest.mark.parametrize("name", SOURCES)
def test_saving_what_was_just_loaded_gives_the_same_files(folder: Path, name: str) -> None:
    before, after = (
        {path.name: path.read_bytes() for path in (folder / run / "checkpoints" / "step_00000010").iterdir()}
        for run in (f"{slug(name)}-before", slug(name))
    )
    assert before.keys() == after.keys()
    assert [file for file in before if before[file] != after[file]] == []
