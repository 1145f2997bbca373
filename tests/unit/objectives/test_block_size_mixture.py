"""A mixture of block sizes: every update has one, a function of (seed, step); each has its own tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bd3_scale.errors import RecipeError
from bd3_scale.objectives.table import ObjectiveSchedule
from bd3_scale.recipe import load, to_yaml
from bd3_scale.recipe.resume_check import compare
from bd3_scale.recipe.schema import ObjectiveConfig
from bd3_scale.rules.validate import validate
from bd3_scale.training.schedules import TunedObjective
from bd3_scale.tuning.interval_tuner import Choice, TunerState

MIXTURE = {4: 0.5, 16: 0.3, 32: 0.2}


def schedule(seed: int = 0, sizes: Any = MIXTURE) -> ObjectiveSchedule:
    return ObjectiveSchedule(ObjectiveConfig(block_size=sizes), 32, 257, seed=seed)


def test_block_sizes_come_in_their_shares_whatever_their_order() -> None:
    drawn = np.array([schedule().size_at(step) for step in range(2000)])
    for size, share in MIXTURE.items():
        assert abs((drawn == size).mean() - share) < 5 * np.sqrt(share * (1 - share) / len(drawn))
    other = schedule(sizes=dict(reversed(MIXTURE.items())))
    assert [other.size_at(step) for step in range(100)] == drawn[:100].tolist()
    assert [schedule(seed=1).size_at(step) for step in range(100)] != drawn[:100].tolist()
    assert [schedule().at(step).block_size for step in range(100)] == drawn[:100].tolist()


def test_the_order_of_block_sizes_is_what_it_was() -> None:
    """Golden: other draws would make every older checkpoint resume as another run."""
    assert [schedule(seed=7).size_at(step) for step in range(12)] == [4, 16, 32, 4, 32, 16, 32, 4, 4, 4, 32, 16]


def test_each_block_size_has_its_own_tuning_and_all_are_kept() -> None:
    start = (1e-3, 1.0)
    state = TunerState.begin(ObjectiveConfig(block_size=MIXTURE))
    assert state.block_size == 4 and [other.block_size for other in state.others] == [16, 32]
    state = state.at(16, start).after(10, Choice((0.3, 0.8), 1.0, True)).at(32, start).after(10, Choice((0.5, 1.0), 2.0, True)).at(4, start)
    assert [state.at(size, start).interval for size in MIXTURE] == [start, (0.3, 0.8), (0.5, 1.0)]
    assert [len(state.at(size, start).history) for size in MIXTURE] == [0, 1, 1]
    assert TunerState.from_dict(state.to_dict()) == state
    assert state.at(32, start).at(16, start).at(4, start) == state, "whatever was asked in between"
    plain = TunerState.begin(ObjectiveConfig(block_size=[[0, 32], [5, 4]]))
    assert plain == TunerState(32, start) and "others" not in plain.to_dict()


def test_a_recipe_holds_a_mixture(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("training: {steps: 5}\nmodel: {context: 32}\nobjective: {block_size: 8}\n")
    recipe = load(file, ["objective.block_size={4: 0.5, 32: 0.5}"])
    validate(recipe)
    file.write_text(to_yaml(recipe))
    again = load(file)
    assert again == recipe and again.objective.block_size == {4: 0.5, 32: 0.5} and again.objective.sizes(32) == {4, 32}
    compare(recipe, again, 3)
    other = replace(recipe, objective=ObjectiveConfig(block_size={4: 0.4, 32: 0.6}))
    with pytest.raises(RecipeError, match=r"objective\.block_size is \{4: 0\.4, 32: 0\.6\} but the run"):
        compare(recipe, other, 3)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({4: 0.5, 16: 0.4}, "must sum up to 1"),
        ({4: 1.5, 16: -0.5}, "must all be above 0"),
        ({4: 0.5, 5: 0.5}, "5"),
        ({"four": 1.0}, "gives block sizes their shares"),
        ({4: "half", 8: 0.5}, "not all numbers"),
        ({}, "gives block sizes their shares"),
    ],
)
def test_what_is_no_mixture_is_refused(value: Any, said: str) -> None:
    with pytest.raises(RecipeError, match="block_size") as refusal:
        schedule(sizes=value)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("objective.block_size={8: 0.5, 16: 0.5}", {8: 0.5, 16: 0.5}),
        ("objective.block_size=[[0, 32], [2, 4]]", [[0, 32], [2, 4]]),
        ("objective.block_size=8", 8),
    ],
)
def test_a_mapping_that_is_written_stands_instead_of_the_recipes(override: str, found: Any, tmp_path: Path) -> None:
    """And of what earlier overrides have there; single names go on adding to it."""
    file = tmp_path / "recipe.yaml"
    file.write_text("objective: {block_size: {4: 0.5, 32: 0.5}}\nvalidation: {sets: {a: /a, b: /b}}\n")
    assert load(file, ["objective.block_size={2: 0.5, 4: 0.5}", override]).objective.block_size == found
    assert load(file, ["validation.sets={}"]).validation.sets == {}
    assert load(file, ["validation.rows=8", "validation.sets={e: /e}", "validation.sets={c: /c}"]).validation.sets == {"c": "/c"}
    assert load(file, ["validation.sets={c: /c}", "validation.sets.d=/d"]).validation.sets == {"c": "/c", "d": "/d"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("objective: {block_size: {4: 0.2, 32: 0.3, 4: 0.5}}", "objective.block_size has 4 twice"),
        ("objective: {block_size: {010: 0.5, 32: 0.5}}", "010, but a number has no leading zeros"),
        ("validation: {sets: {a: [x]}}", "must give names their paths"),
        ("validation: {sets: {a: {b: /x}}}", "must give names their paths"),
        ("validation: {sets: {a: ''}}", "must give names their paths"),
    ],
)
def test_mappings_are_what_they_look_like(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as refusal:
        load(file)
    assert said in str(refusal.value)
    key, _, value = text.partition(": {")
    file.write_text("{}")
    with pytest.raises(RecipeError) as refusal:
        load(file, [f"{key}.{value[:-1].replace(': ', '=', 1)}"])
    assert said in str(refusal.value)


def test_an_amended_density_leaves_every_block_size_its_interval() -> None:
    start = (1e-3, 1.0)
    state = TunerState.begin(ObjectiveConfig(block_size=MIXTURE)).at(16, start).after(10, Choice((0.3, 0.8), 1.0, True)).at(4, start)
    tuned = TunedObjective.__new__(TunedObjective)
    tuned.tuning = replace(state, density=(1, 2), others=tuple(replace(other, density=(3, 4)) for other in state.others))
    tuned.draw_from(None)
    assert tuned.tuning == state, "no density, the same intervals"
    tuned.draw_from((0.1, 0.9))
    assert {tuned.tuning.at(size, start).interval for size in MIXTURE} == {(0.1, 0.9)}
