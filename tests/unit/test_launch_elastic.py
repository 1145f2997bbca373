"""Only a recipe that fits a larger world of the same job waits for it; a limit of time ends the wait."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bd3_scale.errors import RecipeError
from bd3_scale.fault_tolerance import early_exit, run_owner
from bd3_scale.launching import elastic, torchrun
from bd3_scale.launching.node import JOINABLE
from bd3_scale.launching.torchrun import Torchrun
from bd3_scale.recipe import Recipe
from bd3_scale.rules.validate import validate

ENVIRONMENT = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "6", "GROUP_WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}


class Left(Exception):
    """The process would have ended."""


@pytest.fixture
def misfit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recipe:
    """A recipe for multiples of four ranks on three nodes of two, of at most eight."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torchrun, "of_this_rank", lambda: Torchrun(1, 8, "c10d", "first:29400", "x", 0))
    recipe = Recipe()
    recipe.run.dir, recipe.run.time_limit, recipe.training.steps = str(tmp_path), 0.001, 10
    recipe.parallel.tensor, recipe.parallel.pipeline, recipe.parallel.micro_batch = 2, 2, 1
    recipe.parallel.zero = 0
    return recipe


def wait(recipe: Recipe) -> None:
    with pytest.raises(RecipeError) as error:
        validate(recipe, 6, "cpu")
    elastic.wait_for_nodes(recipe, "cpu", error.value)


def test_it_waits_for_the_sizes_that_fit(
    misfit: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heartbeat.json").write_text('{"step": 7}')

    def left(name: str, leader: bool) -> None:
        raise Left(name)

    monkeypatch.setattr(early_exit, "leave", left)
    monkeypatch.setenv(JOINABLE, "1")
    with pytest.raises(Left, match="time_limit"):
        wait(misfit)
    assert "6 ranks do not fit this recipe (the world of 6 ranks must be a multiple of parallel.tensor" in (said := capfd.readouterr().err)
    assert "8 or 16 would: waiting for nodes to join\n" in said or "8 or 12 or 16 would: waiting for nodes to join\n" in said
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["doing"]) == (7, "wait")
    monkeypatch.delenv(JOINABLE)
    with pytest.raises(Left):
        wait(misfit)
    assert "unless all of them are started with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capfd.readouterr().err


def test_the_heartbeat_of_another_job_is_left_alone(misfit: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_owner, "kernel", lambda: "")  # as on another host
    monkeypatch.setattr(run_owner, "BEAT", 0.05)
    monkeypatch.setattr(run_owner, "PAUSE", 0.02)

    def left(name: str, leader: bool) -> None:
        raise Left(name)

    monkeypatch.setattr(early_exit, "leave", left)
    other = run_owner.Owner(tmp_path, run_owner._take(tmp_path, ["another torchrun"]), beats=True)
    (tmp_path / "heartbeat.json").write_text('{"step": 7}')
    with pytest.raises(RecipeError, match="belongs to another job"):
        wait(misfit)
    assert (tmp_path / "heartbeat.json").read_text() == '{"step": 7}'
    other.release()


def test_it_does_not_wait_in_vain(misfit: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    for told in (None, Torchrun(3, 3, "c10d", "first:29400", "x", 0), Torchrun(1, 8, "static", "first:29400", "x", 0)):
        monkeypatch.setattr(torchrun, "of_this_rank", lambda told=told: told)
        wait(misfit)  # comes back
    monkeypatch.setattr(torchrun, "of_this_rank", lambda: Torchrun(1, 8, "c10d", "first:29400", "x", 0))
    misfit.model.heads = 7  # wrong on any number of ranks
    wait(misfit)
    misfit.model.heads = 12
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    wait(misfit)
