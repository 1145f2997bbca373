"""A schedule of batches is what somebody finds who walks through the run update by update, counting samples."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.errors import RecipeError
from bd3_scale.recipe.batches import at_least, batch_schedule

SCHEDULES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=6).map(
    lambda pairs: [[sum(gap for gap, _ in pairs[1 : index + 1]), rows] for index, (_, rows) in enumerate(pairs)]
)


@given(SCHEDULES)
def test_every_update_is_the_one_that_a_walk_finds(value: list[list[int]]) -> None:
    schedule, samples = batch_schedule(value), 0
    for step in range(120):
        rows = [size for start, size in value if start <= samples][-1]
        assert (schedule.samples_before(step), schedule.rows_at(step), schedule.rows_after(samples)) == (samples, rows, rows)
        assert schedule.steps_for(samples) == step and {schedule.steps_for(samples + part) for part in range(1, rows + 1)} == {step + 1}
        samples += rows
    steps = [phase.step for phase in schedule.phases]
    assert steps == sorted(set(steps)), "every phase has an update"
    assert all(one.rows != other.rows for one, other in pairwise(schedule.phases)), "every phase is another number"
    assert {phase.rows for phase in schedule.phases} <= {rows for _, rows in value}


@given(st.integers(1, 500), st.integers(0, 10**6))
def test_one_number_is_all_updates(rows: int, step: int) -> None:
    schedule = batch_schedule(rows)
    assert (schedule.rows_at(step), schedule.samples_before(step), schedule.steps_for(step)) == (rows, step * rows, -(-step // rows))


@given(SCHEDULES, st.integers(1, 40))
def test_raised_batches_are_no_smaller_and_otherwise_as_before(value: list[list[int]], rows: int) -> None:
    for asked in (value, value[0][1]):
        before, raised = batch_schedule(asked), batch_schedule(at_least(asked, rows))
        assert raised.smallest >= rows
        if before.smallest >= rows:
            assert [raised.rows_at(step) for step in range(100)] == [before.rows_at(step) for step in range(100)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "is 0, but a batch has at least one row; set 1 or more"),
        ([[0, 8], [64, -8]], "is -8, but a batch has at least one row"),
        ("many", r"is 'many'; set a whole number or a list of \[from sample, rows\], such as \[\[0, 64\], \[1000000, 128\]"),
        (True, "is True; set a whole number"),
        (8.5, "is 8.5; set a whole number"),
        ([], r"is \[\]; set a whole number"),
        ([8, 16], "has the entry 8; set a whole number"),
        ([[0, 8], [1e6, 16]], r"has the entry \[1000000.0, 16\]"),
        ([[8, 16]], "starts at sample 8, which leaves the samples before without one; start at sample 0"),
        ([[0, 8], [64, 16], [64, 32]], "has sample 64 after sample 64; put the samples in ascending order"),
    ],
)
def test_anything_else_is_refused_by_name(value: Any, said: str) -> None:
    with pytest.raises(RecipeError, match="^training.global_batch " + said):
        batch_schedule(value)
