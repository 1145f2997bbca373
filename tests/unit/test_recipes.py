"""Every recipe that is shipped works: it validates at its real world size, and its shape trains when shrunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bd3_scale import recipe as recipes
from bd3_scale.engines.initialise import initialise
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import ObjectiveSchedule
from bd3_scale.planning.cluster_plan import cluster_plan
from bd3_scale.planning.devices import device_named
from bd3_scale.planning.report import make_plan
from bd3_scale.planning.search import search
from bd3_scale.rules.validate import validate

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
WORLD_SIZES = {"owt_110m": 64, "lm1b_110m": 8, "owt_1b": 64, "owt_1b_stream": 64, "owt_1b_32k": 64, "owt_7b": 64}
DAYS_AND_FLOPS = {"owt_1b": (1.25, 1.12), "owt_1b_stream": (1.25, 1.12), "owt_7b": (5.5, 1.15)}
"""On their 64 H100 at 40 % while they compute: at most so many days, and so many times the FLOPs of a next-token run."""
CLUSTER = [
    "model.key_value_heads=4",
    "model.mlp_hidden=96",
    "objective.block_size=[[0,32],[10,8]]",
    "parallel.pipeline=1",
    "parallel.virtual_stages=1",
    "parallel.engine=fsdp",
]
SCHEDULE = ["objective.block_size=[[0,32],[10,8]]"]
SHRUNK_FURTHER = {"lm1b_110m": SCHEDULE, "owt_110m": SCHEDULE} | dict.fromkeys(("owt_1b", "owt_1b_stream", "owt_1b_32k", "owt_7b"), CLUSTER)
"""Their layouts are trained by tests/distributed/test_layouts.py."""
SHRUNK = ["model.head_loss=eager", "model.layers=2", "model.hidden=48", "model.heads=4", "model.context=32", "model.conditioning_size=8"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_validates_at_its_world_size(path: Path) -> None:
    for device in ("cpu", "cuda"):
        validate(recipes.load(path), WORLD_SIZES.get(path.stem, 1), device)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_shrunk_learns_a_batch(path: Path, world_of_one: object) -> None:
    recipe = recipes.load(path, [*SHRUNK, *SHRUNK_FURTHER.get(path.stem, [])])
    validate(recipe, WORLD_SIZES.get(path.stem, 1), "cpu")
    model = Transformer(recipe.model, 11, 10)
    initialise(model, recipe.model, recipe.run.seed)
    objective = ObjectiveSchedule(recipe.objective, recipe.model.context, mask_id=10).at(0)
    rows = np.tile(np.arange(8), (2, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    inputs = objective.training_inputs(rows, np.arange(2), 0, 0, 2)  # one batch under one noise: nothing but learning moves the loss
    losses = []
    for _ in range(40):
        loss = model(inputs)[0] / (2 * objective.scored_tokens_per_row)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


@pytest.mark.parametrize("name", ["owt_110m", "lm1b_110m", "owt_1b", "owt_7b"])
def test_recipe_of_a_cluster_is_as_fast_as_the_planner_knows(name: str) -> None:
    """Within a tenth of the best layout for its devices, over the whole schedule of block sizes; the one that shows every kind of
    division at once, where all layouts compute equally fast."""
    cluster = cluster_plan(
        recipes.load(ROOT / "recipes" / f"{name}.yaml"), WORLD_SIZES[name], device_named("h100", WORLD_SIZES[name]), 50258
    )
    mfu = 0.4 if name == "owt_7b" else None
    plan, best = make_plan(cluster, mfu), search(cluster, mfu, most=1)[0]
    assert plan.fits and plan.seconds < 1.1 * best.seconds, f"{plan.seconds / 86400:.2f} days, {best}"
    days, flops = DAYS_AND_FLOPS.get(name, (1.0, 1.2))
    assert plan.seconds < days * 86400 and plan.flops_ratio < flops


def test_streamed_recipe_is_the_other_but_for_its_data() -> None:
    plain, streamed = (recipes.flatten(recipes.load(ROOT / "recipes" / f"{name}.yaml")) for name in ("owt_1b", "owt_1b_stream"))
    different = {key for key, value in plain.items() if streamed[key] != value}
    assert different == {"run.name", "run.dir", "data.path", "data.remote", "data.cache_bytes"} and streamed["data.remote"]
