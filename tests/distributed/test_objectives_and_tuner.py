"""The other objectives and the in-loop tuner, on 1, 2 and 4 processes and across a resume (issue 3, property 8)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.conftest import metrics, train_all
from tests.distributed.launch import launch

TUNED = ["tuner.enabled=true", "tuner.every=5", "tuner.start_step=5", "objective.block_size=4", "validation.rows=40"]
KINDS = {kind: [f"objective.kind={kind}", "objective.block_size=null"] for kind in ("ar", "mdlm")}


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("runs")
    results: dict[str, list[dict]] = {}

    def go(world_size: int, named: dict[str, list[str]]) -> None:
        paths = {folder / name: overrides for name, overrides in named.items()}
        for name, lines in zip(named, train_all(world_size, recipe, paths, folder).values(), strict=True):
            results[name] = lines

    stages = "objective.block_size=[[0,32],[10,8],[15,1]]"
    go(1, {"tuned-1": TUNED, "ar-1": KINDS["ar"], "mdlm-1": KINDS["mdlm"], "stages-1": [stages]})
    go(
        2,
        {
            "tuned-2": [*TUNED, "training.steps=12"],
            "ar-2": KINDS["ar"],
            "mdlm-2": [*KINDS["mdlm"], "parallel.zero=3"],
            "stages-2": [stages],
        },
    )
    shutil.copytree(folder / "tuned-2", folder / "tuned-2-then-4")
    go(4, {"tuned-4": [*TUNED, "parallel.zero=3"], "tuned-2-then-4": [*TUNED, "parallel.zero=2"]})
    return results


def of(lines: list[dict], kind: str, key: str) -> list:
    return [line[key] for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("name", ["tuned-4", "tuned-2-then-4"])
def test_tuner_chooses_the_same_interval_on_any_number_of_ranks(runs: dict[str, list[dict]], name: str) -> None:
    expected, found = runs["tuned-1"], runs[name]
    assert of(found, "tuner", "step") == of(expected, "tuner", "step") == [5, 10, 15, 20]
    assert of(found, "tuner", "interval") == of(expected, "tuner", "interval")
    assert of(found, "train", "interval") == of(expected, "train", "interval")
    assert any(of(expected, "tuner", "changed")), "the interval never changed: the comparison says little"
    for ours, theirs in zip(of(found, "tuner", "variances"), of(expected, "tuner", "variances"), strict=True):
        assert np.allclose([item["variance"] for item in ours], [item["variance"] for item in theirs], rtol=1e-4, equal_nan=True)
    assert np.abs(np.array(of(found, "train", "loss")) / of(expected, "train", "loss") - 1).max() < 1e-5


def test_a_fixed_interval_is_never_changed(runs: dict[str, list[dict]]) -> None:
    assert not of(runs["stages-1"], "tuner", "step")
    assert all(interval == [1e-3, 1.0] for interval in of(runs["stages-1"], "train", "interval"))


@pytest.mark.parametrize("kind", ["ar", "mdlm", "stages"])
def test_other_objectives_do_not_depend_on_ranks(runs: dict[str, list[dict]], kind: str) -> None:
    one, two = runs[f"{kind}-1"], runs[f"{kind}-2"]
    assert len(of(one, "train", "loss")) == 20
    assert np.abs(np.array(of(two, "train", "loss")) / of(one, "train", "loss") - 1).max() < 1e-5
    assert np.abs(np.array(of(two, "validation", "nelbo")) / of(one, "validation", "nelbo") - 1).max() < 1e-5


def test_ranks_that_disagree_on_the_interval_abort(recipe: Path, tmp_path: Path) -> None:
    script = tmp_path / "disagree.py"
    script.write_text(
        "import sys\n"
        "from bd3_scale import train\n"
        "from bd3_scale.parallel.layout import Layout\n"
        "from bd3_scale.diffusion.tuner import Choice\n"
        "heard = Layout.broadcast\n"
        "def misheard(self, value):\n"
        "    value = heard(self, value)\n"
        "    return Choice((0.3, 0.8), 1.0, True) if self.rank == 1 and isinstance(value, Choice) else value\n"
        "Layout.broadcast = misheard\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    arguments = [str(script), str(recipe), f"run.dir={tmp_path / 'run'}", *TUNED]
    finished = launch(2, arguments, tmp_path / "log", timeout=120)
    assert finished.status != 0
    assert any("bd3_scale: error:" in line and "different intervals" in line for line in finished.output.splitlines()), finished.output[
        -3000:
    ]


def test_sampling_from_an_ar_and_an_mdlm_run(runs: dict[str, list[dict]], recipe: Path, tmp_path: Path) -> None:
    for kind in ("ar", "mdlm"):
        run = tmp_path / kind
        train_all(1, recipe, {run: [*KINDS[kind], "training.steps=2"]}, tmp_path)
        assert metrics(run)
        finished = launch(1, ["-m", "bd3_scale.sample", str(run), "--length", "24", "--json"], tmp_path / f"{kind}.log", timeout=120)
        assert finished.status == 0, finished.output[-3000:]
