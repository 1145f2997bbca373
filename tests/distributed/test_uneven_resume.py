"""A rank is lost: a run of four goes on with three, whose shares are uneven, and later with four again, as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.conftest import metrics, train_all
from tests.distributed.launch import ALL

TUNED = [
    "tuner.enabled=true",
    "tuner.kind=density",
    "tuner.every=5",
    "tuner.start_step=5",
    "tuner.margin=0",
    "tracking.control_variate=true",
]
DRAWS = ["objective.block_size=4", "objective.draws=2", "training.global_batch=16"]  # 8 rows of data
COMMON = [*DRAWS, *TUNED, "validation.every=5"]
LAYOUTS = {"zero_1": ["parallel.zero=1"], "zero_3": ["parallel.zero=3", "parallel.micro_batch=null"]}
if not ALL:
    del LAYOUTS["zero_3"]


@pytest.fixture(scope="module")
def folder(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uneven")
    train_all(1, recipe, {folder / "whole": COMMON}, folder)
    for world_size, steps in ((4, 7), (3, 12), (4, 20)):
        train_all(
            world_size,
            recipe,
            {folder / name: [*COMMON, *layout, f"training.steps={steps}"] for name, layout in LAYOUTS.items()},
            folder,
        )
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_on_four_ranks_then_three_then_four_is_the_run_of_one(folder: Path, name: str) -> None:
    whole, run = metrics(folder / "whole"), metrics(folder / name)
    compared = [("train", key, 20) for key in ("loss", "controlled_loss", "gradient_norm", "data_tokens")]
    compared += [("validation", "nelbo", 4), ("tuner", "density", 4)]
    for kind, key, count in compared:
        expected = {line["step"]: line[key] for line in whole if line["kind"] == kind}
        # A part validates at its own end, too.
        found = {line["step"]: line[key] for line in run if line["kind"] == kind and line["step"] in expected}
        assert list(found) == list(expected) and len(found) == count
        np.testing.assert_allclose(np.hstack(list(found.values())), np.hstack(list(expected.values())), rtol=1e-5)
