"""The mean of a run's last checkpoints: its tensors are that, it is sampled like any checkpoint, and only what belongs together counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint import store
from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.checkpoint.region import Region
from bd3_scale.convert import __main__ as convert_checkpoint
from bd3_scale.generation.load_model import load_network, read_recipe
from bd3_scale.sample import main as sample
from tests.unit.test_sample_command import save_run

pytestmark = pytest.mark.usefixtures("world_of_one")


def convert(*arguments: Any) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 100, 200, 300, 400; of the last, what is behind `latest`."""
    generator = torch.Generator().manual_seed(0)
    first = Checkpoint(save_run(tmp_path / "run") / "checkpoints" / "step_00000100")
    for step in (200, 300, 400):
        fragments = [
            Fragment(kind, name, Region.whole(shape), torch.randn(shape, generator=generator).view(-1) * 0.3)
            for kind in ("weight", "ema")
            for name, shape in first.shapes("weight").items()
        ]
        recipe = recipes.to_yaml(read_recipe(first))
        store.save(tmp_path / "run" / "checkpoints", step, fragments, samples_consumed=step, run=first.run, recipe=recipe)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000300")
    return tmp_path / "run"


@pytest.mark.parametrize(("by", "counts"), [("uniform", (1, 1)), ("step", (2, 3))])
@pytest.mark.parametrize("kind", ["weight", "ema"])
def test_it_is_the_mean_up_to_the_latest(by: str, counts: tuple[int, int], kind: str, run: Path, tmp_path: Path) -> None:
    assert convert("average", run, tmp_path / "mean", "--last", 2, "--by", by, "--weights", kind) == 0
    parts = [Checkpoint(run / "checkpoints" / f"step_00000{step}00") for step in (2, 3)]
    made = Checkpoint(store.locate(tmp_path / "mean"))
    assert made.step == 300 and made.kinds == ("weight",)
    made.verify_files()
    for name in made.shapes("weight"):
        expected = sum(count * part.read(kind, name).double() for count, part in zip(counts, parts, strict=True)) / sum(counts)
        torch.testing.assert_close(made.read("weight", name), torch.as_tensor(expected).float(), rtol=1e-6, atol=1e-7)
    assert load_network(tmp_path / "mean", device="cpu").weights == "weight"
    assert getattr(load_network(tmp_path / "mean", device="cpu").objective, "interval") == (0.3, 0.8)  # noqa: B009 - the tuned one


def test_a_mean_of_one_is_the_checkpoint_and_samples(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("average", run, tmp_path / "one", "--last", 1) == 0
    texts = []
    for path in (run, tmp_path / "one"):
        capsys.readouterr()
        assert sample([str(path), "--weights", "weight", "--json", "--ignore-eos"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["texts"])
    assert texts[0] == texts[1]


def test_what_does_not_belong_together_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_run(tmp_path / "other", 200, model={"mlp_hidden": 24})
    (run / "checkpoints" / "step_00000200").rename(tmp_path / "aside")
    (other / "checkpoints" / "step_00000200").rename(run / "checkpoints" / "step_00000200")
    for arguments, said in (
        (["--last", 2], "different networks"),
        (["--last", 9], "holds 3 checkpoints up to step 300; set --last 3"),
        (["--last", 0], "--last is 0"),
        (["--by", "loss"], "--by 'loss'"),
    ):
        assert convert("average", run, tmp_path / "mean", *arguments) != 0
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (tmp_path / "mean").exists()
