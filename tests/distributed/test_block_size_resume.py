"""The block size changes over from L, one stream of rows, to a smaller one: where a run is stopped around it, nothing is seen of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.conftest import metrics, train_all

TUNED = ["tuner.enabled=true", "tuner.kind=both", "tuner.every=5", "tuner.start_step=5", "tuner.margin=0"]
COMMON = ["objective.block_size=[[0,32],[10,8]]", *TUNED]
STOPS = {
    # run: (ranks, steps at their end, layout), one after the other
    "where it changes, and later": [(1, 10, []), (1, 17, []), (1, 20, [])],
    "before and after, other layouts": [
        (2, 8, ["parallel.zero=3"]),
        (1, 10, []),
        (2, 14, ["parallel.pipeline=2", "parallel.zero=3"]),
        (2, 20, ["parallel.tensor=2", "parallel.sequence=true"]),
    ],
}


@pytest.fixture(scope="module")
def folder(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changes")
    train_all(1, recipe, {folder / "whole": COMMON}, folder)
    for name, parts in STOPS.items():
        for ranks, steps, layout in parts:
            train_all(
                ranks, recipe, {folder / name.replace(" ", "_").replace(",", ""): [*COMMON, *layout, f"training.steps={steps}"]}, folder
            )
    return folder


@pytest.mark.parametrize("name", STOPS)
def test_a_run_stopped_around_the_change_is_the_whole_run(folder: Path, name: str) -> None:
    whole, run = metrics(folder / "whole"), metrics(folder / name.replace(" ", "_").replace(",", ""))
    alone = all(ranks == 1 for ranks, _, _ in STOPS[name])
    for kind, key, count in (
        ("train", "loss", 20),
        ("train", "gradient_norm", 20),
        ("validation", "nelbo", 4),
        ("tuner", "interval", 4),
        ("tuner", "density", 4),
    ):
        expected = {line["step"]: line[key] for line in whole if line["kind"] == kind}
        found = {line["step"]: line[key] for line in run if line["kind"] == kind and line["step"] in expected}
        assert list(found) == list(expected) and len(found) == count
        np.testing.assert_allclose(np.hstack(list(found.values())), np.hstack(list(expected.values())), rtol=0 if alone else 1e-5)
