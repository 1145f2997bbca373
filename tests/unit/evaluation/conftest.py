"""A data folder and checkpoints of tiny networks over bytes, context 16, for all tests of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bd3_scale.data.preparation.packing import Document
from bd3_scale.data.preparation.prepare import Packing, prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.distributed.layout import Layout
from tests.unit.test_sample_command import save_run

CONTEXT = 16


def save_data(folder: Path, **changes: Any) -> Path:
    """Rows of invented words; `changes` to how they are packed."""
    tokenizer = changes.pop("tokenizer", load_tokenizer("bytes"))
    numbers = np.random.Generator(np.random.Philox(3))
    words = ["".join(numbers.choice(list("abcde "), 40)) for _ in range(30)]
    documents = [Document(word, np.array(tokenizer.encode(word)), place % 2 == 0) for place, word in enumerate(words)]
    prepare(folder, Packing(tokenizer, **{"context": CONTEXT, **changes}), "tests", None, lambda: documents)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data") / "rows")


@pytest.fixture(scope="session")
def checkpoint(world_of_one: Layout, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(kind="ar", ...) -> a run directory; one per set of keys of the objective."""
    made: dict[str, Path] = {}

    def make(**objective: Any) -> Path:
        objective = {"block_size": None, **objective} if objective.get("kind", "bd3") != "bd3" else objective
        key = repr(sorted(objective.items()))
        if key not in made:
            made[key] = save_run(tmp_path_factory.mktemp("run"), **objective)
        return made[key]

    return make
