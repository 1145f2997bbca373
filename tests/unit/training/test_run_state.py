"""What a checkpoint keeps of a run beside its tensors: whatever version wrote it, it is saved again as the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bd3_scale.errors import CheckpointError
from bd3_scale.recipe import Recipe
from bd3_scale.training.run_state import RunState

TUNER = {"block_size": 8, "interval": [0.3, 0.8], "history": [{"step": 5, "block_size": 8, "interval": [0.3, 0.8], "variance": None}]}
OLDEST: dict[str, Any] = {"tuner": TUNER, "data": {"fingerprint": "f"}, "wandb": None}
AMENDMENT = {"step": 3, "key": "training.clip", "before": 1.0, "now": 0.5}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {
            "tokenizer": {"name": "bytes", "fingerprint": "a"},
            "wandb": "abc",
            "step_rule": {"norms": [1.0], "counts": [1, 0, 0], "known": 1},
        },
        {"amendments": [AMENDMENT], "unfinished_validation": True},
        {"converted": {"from": "bd3lms", "source": "/x"}, "a later version's": [1, 2]},
    ],
    ids=["oldest", "usual", "stopped", "converted"],
)
def test_what_was_loaded_is_saved_as_the_same(more: dict[str, Any]) -> None:
    assert RunState.from_dictionary(OLDEST | more).to_dictionary() == OLDEST | more


def test_a_new_run_says_nothing_of_what_has_not_happened() -> None:
    data: Any = SimpleNamespace(tokenizer=SimpleNamespace(name="bytes", fingerprint="a"), fingerprint="f")
    recipe = Recipe()
    recipe.objective.block_size, recipe.objective.interval = [[0, 4], [10, 8]], (0.2, 0.9)
    assert RunState.begin(recipe.objective, data).to_dictionary() == {
        "tuner": {"block_size": 4, "interval": [0.2, 0.9], "history": []},
        "tokenizer": {"name": "bytes", "fingerprint": "a"},
        "data": {"fingerprint": "f"},
        "wandb": None,
    }


def test_a_tuner_that_is_none_is_an_error_for_people() -> None:
    with pytest.raises(CheckpointError, match="tuner state cannot be read"):
        RunState.from_dictionary(OLDEST | {"tuner": {"block_size": 8}})
