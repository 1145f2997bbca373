"""An objective outside the package is one file: with its row in the table it is trained, planned, saved and loaded as any other."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bd3_scale import recipe as recipes
from bd3_scale.convert import export
from bd3_scale.errors import RecipeError
from bd3_scale.generation.load_model import load_network
from bd3_scale.generation.sampler import check
from bd3_scale.generation.token_sampling import SamplingOptions
from bd3_scale.objectives.table import OBJECTIVES, BlockDiffusion, register_objective
from bd3_scale.planning.cluster_plan import cluster_plan
from bd3_scale.planning.devices import device_named
from bd3_scale.recipe.objective_kinds import KINDS, Kind
from bd3_scale.rules.validate import validate
from bd3_scale.train import train
from tests.distributed.conftest import RECIPE
from tests.invented import prepare_invented

EXAMPLE = Path(__file__).parents[3] / "examples" / "new_objective.py"
CAPPED = "objective.kind=capped_bd3"


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The example's module; its objective is unknown again after the test."""
    before = dict(KINDS), dict(OBJECTIVES)
    spec = importlib.util.spec_from_file_location("new_objective", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["new_objective"] = module  # where dataclasses look for the names of its annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["new_objective"]
    for table, rows in zip((KINDS, OBJECTIVES), before, strict=True):
        table.clear()
        table.update(rows)  # type: ignore[arg-type]


def test_an_objective_of_sixty_lines_is_trained_planned_and_loaded(example: ModuleType, world_of_one: Any, tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("DATA", str(prepare_invented(tmp_path / "data", 32))))
    recipe = recipes.load(path, [CAPPED, f"run.dir={tmp_path / 'run'}", "training.ema=0", "tracking.sample_tokens=16"])
    validate(recipe)
    assert cluster_plan(recipe, 4, device_named("h100", 4)).phases[0].block_size == 8
    train(recipe, world_of_one)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 20 and np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5
    loaded = load_network(tmp_path / "run", device="cpu")
    mask = loaded.tokenizer.mask_id
    assert loaded.objective == example.CappedBlockDiffusion(mask, 32, 8)
    with pytest.raises(RecipeError, match=r"capped_bd3 is none that the modeling code of a directory knows"):
        export.directory(tmp_path / "run", tmp_path / "exported")
    # It is what it says: capped weights of the same masks, and the validation of bd3.
    rows, slots, plain = np.zeros((8, 32), np.int64), np.arange(8), BlockDiffusion(mask, 32, 8)
    ours, theirs = (one.training_inputs(rows, slots, 3, 0, 8) for one in (loaded.objective, plain))
    assert torch.equal(ours.tokens, theirs.tokens) and theirs.weights.max() > example.LARGEST_WEIGHT
    assert torch.equal(ours.weights, theirs.weights.clamp(max=example.LARGEST_WEIGHT))
    ours, theirs = (one.validation_inputs(rows, slots, 0) for one in (loaded.objective, plain))
    assert torch.equal(ours.weights, theirs.weights)


def test_its_row_is_what_the_rules_ask(example: ModuleType, base: Path) -> None:
    with pytest.raises(RecipeError, match=r"objective\.noise_schedule is 'log', which means nothing to objective\.kind=capped_bd3"):
        validate(recipes.load(base, [CAPPED, "objective.noise_schedule=log"]))
    register_objective(Kind("told", noise_conditioned=True))(example.CappedBlockDiffusion)
    with pytest.raises(RecipeError, match=r"objective\.kind = told .* model\.conditioning = none; set model\.conditioning=adaln$"):
        validate(recipes.load(base, ["objective.kind=told"]))
    with pytest.raises(RecipeError, match=r"objective\.kind=told has no sampler that conditions its blocks on noise"):
        check(example.CappedBlockDiffusion(5, 16, 4), SamplingOptions(), 16)
    with pytest.raises(ValueError, match=r"call objective\.noise_schedule 'schedule', its former name; rename it"):
        register_objective(Kind("old", unused_keys=("schedule",)))(example.CappedBlockDiffusion)
    with pytest.raises(ValueError, match="'bd3' exists already; register CappedBlockDiffusion under another name"):
        register_objective(Kind("bd3"))(example.CappedBlockDiffusion)


def test_without_the_file_its_kind_is_unknown(base: Path) -> None:
    with pytest.raises(RecipeError, match=r"objective\.kind is 'capped_bd3', which does not exist; set one of bd3, mdlm, sedd, ssdlm, ar"):
        validate(recipes.load(base, [CAPPED]))


def test_recipes_are_checked_without_torch(base: Path) -> None:
    """The package, its recipes and every check of theirs."""
    code = (
        "import sys, bd3_scale; from bd3_scale import recipe as recipes;"
        "from bd3_scale.rules.validate import validate;"
        f"validate(recipes.load({str(base)!r}, ['tuner.enabled=true'])); bd3_scale.Kind; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=EXAMPLE.parents[1])
