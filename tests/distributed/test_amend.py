"""A run is changed on purpose from a checkpoint on, or its newest checkpoint is damaged: what follows is what anybody continues."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from bd3_scale.checkpoint.store import Checkpoint
from tests.distributed.conftest import metrics, train_all
from tests.distributed.forked import run_ranks

RATE = ["training.learning_rate=1e-3", "training.clip=0.1"]
AMEND = [*RATE, "run.amend=[training.learning_rate,training.clip]"]
SKIP = "data.skip=[[88,104],[120,121]]"
STAGES = ["objective.block_size=[[0,32],[12,8]]", "training.rewarmup=3"]
COSINE = ["training.learning_rate_schedule=cosine"]
DIVERGES = """
import contextlib, io, os, re, sys
os.environ.pop("RANK")
from bd3_scale import train
from bd3_scale.objectives.table import BlockDiffusion
from bd3_scale.distributed import layout
clean, known, bad = BlockDiffusion.training_inputs, {}, set()
def poisoned(self, rows, slots, step, seed, global_batch):
    inputs = clean(self, rows, slots, step, seed, global_batch)
    known.setdefault(step, set()).update(row.tobytes() for row in rows)
    if step in (5, 6) and not frozen:
        bad.update(row.tobytes() for row in rows)
    if any(row.tobytes() in bad for row in rows):
        inputs.weights.mul_(float("inf"))
    return inputs
BlockDiffusion.training_inputs = poisoned
def go(*more):
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        status = train.main([*sys.argv[1:], "training.skipped_in_a_row=1", "checkpoint.every=4", *more])
    layout.stop()
    return status, text.getvalue()
frozen = False
status, said = go()
assert status == 1 and "bd3_scale: error:" in said, said
frozen = True
assert go()[1].count("were left out, because") == 1, "the same rows meet the same spike for ever"
rate, skip = re.search(r"\\((training.learning_rate=.*?)\\), or without their rows \\((.*?)\\)", said).groups()
for way in (rate, skip):
    status, text = go(*way.split())
    assert "run.amend: " in text and status == (way is rate), text  # a lower rate does not help against these
print("on by", skip)
"""
FEW = ["validation.every=0", "validation.rows=2", "tracking.plots=false"]


@pytest.fixture(scope="module")
def folder(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("amend")

    def go(ranks: int, runs: dict[str, list[str]]) -> None:
        train_all(ranks, recipe, {folder / name: [*FEW, *overrides] for name, overrides in runs.items()}, folder)

    go(1, {"half": ["training.steps=10"], "plain": [], "skipped": [SKIP], "stages": STAGES})
    go(1, {"stages in two": [*STAGES, "training.steps=12"], "longer": [*COSINE, "training.steps=10"]})
    go(1, {"stages in two": STAGES, "longer": COSINE})
    for name in ("amended", "in parts", "skipped later", "narrowed"):
        shutil.copytree(folder / "half", folder / name)
    go(
        1,
        {
            "amended": AMEND,
            "in parts": [*AMEND, "training.steps=14"],
            "skipped later": [SKIP, "run.amend=[data.skip]"],
            "narrowed": ["objective.interval=[0.3,0.8]", "run.amend=[objective.interval]"],
        },
    )
    shutil.copytree(folder / "amended", folder / "damaged")
    damaged = next((folder / "damaged" / "checkpoints" / "step_00000020").glob("state-*"))
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    go(1, {"amended": [*AMEND, "training.steps=24"], "damaged": [*AMEND, "training.steps=24", "checkpoint.fallback=true"]})
    go(2, {"in parts": [*RATE, "training.steps=24"]})
    return folder


def curve(folder: Path, name: str) -> np.ndarray:
    lines = [line for line in metrics(folder / name) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["loss"] for line in lines])


def remembered(folder: Path, name: str) -> int:
    """Norms that the step rule compares with after 20 steps."""
    return Checkpoint(folder / name / "checkpoints" / "step_00000020").run["step_rule"]["known"]


def amendments(folder: Path, name: str) -> list[tuple[int, str, object]]:
    return [(line["step"], line["key"], line["now"]) for line in metrics(folder / name) if line["kind"] == "amendment"]


def test_an_amended_run_is_the_amended_run_however_it_is_stopped(folder: Path) -> None:
    plain, amended, parts = (curve(folder, name) for name in ("plain", "amended", "in parts"))
    np.testing.assert_array_equal(plain[:10], amended[:10])
    assert (np.abs(plain[11:20] / amended[11:20] - 1) > 1e-5).all()
    assert len(parts) == len(amended) == 24
    np.testing.assert_allclose(parts, amended, rtol=1e-5)
    changes = [(10, "training.learning_rate", 1e-3), (10, "training.clip", 0.1)]
    assert amendments(folder, "amended") == changes == amendments(folder, "in parts")


def test_the_error_of_a_run_that_diverged_says_what_helps(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "diverges.py").write_text(DIVERGES)
    arguments = [str(tmp_path / "diverges.py"), str(recipe), f"run.dir={tmp_path / 'run'}", *FEW]
    finished = run_ranks(1, arguments, tmp_path / "log", timeout=200)
    assert finished.status == 0, finished.output[-5000:]
    assert "on by data.skip=[[40,56]] run.amend=[data.skip]" in finished.output
    assert len(curve(tmp_path, "run")) == 20


def test_samples_that_are_left_out_later_are_as_if_never_there(folder: Path) -> None:
    whole, later, plain = (curve(folder, name) for name in ("skipped", "skipped later", "plain"))
    np.testing.assert_array_equal(whole, later)
    np.testing.assert_array_equal(plain[:11], later[:11])
    assert (plain[11:] != later[11:]).all()
    assert amendments(folder, "skipped later") == [(10, "data.skip", [[88, 104], [120, 121]])]


def test_an_amended_interval_is_drawn_from(folder: Path) -> None:
    drawn = [line["interval"] for line in metrics(folder / "narrowed") if line["kind"] == "train"]
    assert drawn == [[1e-3, 1.0]] * 10 + [[0.3, 0.8]] * 10
    assert remembered(folder, "narrowed") == 10 and remembered(folder, "plain") == 20, "norms of another interval are forgotten"


def test_another_block_size_warms_up_and_is_compared_with_its_own_norms(folder: Path) -> None:
    np.testing.assert_array_equal(curve(folder, "stages"), curve(folder, "stages in two"))
    assert remembered(folder, "stages") == remembered(folder, "stages in two") == 8
    rates = [line["learning_rate"] for line in metrics(folder / "stages") if line["kind"] == "train"]
    np.testing.assert_allclose(rates[11:16], [3e-3, 1e-3, 2e-3, 3e-3, 3e-3], rtol=1e-9)


def test_a_longer_budget_says_what_jumps(folder: Path) -> None:
    (warning,) = [line for line in metrics(folder / "longer") if line["kind"] == "warning"]
    assert (
        "the learning rate of step 10 jumps from 0.0003 to 0.00" in warning["text"]
        and "training.learning_rate_schedule=cosine" in warning["text"]
    )
    assert not [line for name in ("amended", "in parts") for line in metrics(folder / name) if line["kind"] == "warning"]


def test_a_damaged_checkpoint_falls_back_where_that_is_asked_for(folder: Path) -> None:
    np.testing.assert_array_equal(curve(folder, "damaged"), curve(folder, "amended"))
    (warning,) = [line for line in metrics(folder / "damaged") if line["kind"] == "warning"]
    assert warning["step"] == 10 and "continuing from step_00000010, because checkpoint" in warning["text"]
    assert amendments(folder, "damaged") == amendments(folder, "amended")
