"""A schedule of batches is what somebody finds who walks through the run update by update, counting samples; and whatever the number of
replicas, a global batch is shared exactly: every slot once, the same forwards on all."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bd3_scale.batches import Shares
from bd3_scale.errors import RecipeError
from bd3_scale.recipe.stages import at_least, batch_schedule

SCHEDULES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=6).map(
    lambda pairs: [[sum(gap for gap, _ in pairs[1 : index + 1]), rows] for index, (_, rows) in enumerate(pairs)]
)


@given(SCHEDULES, st.integers(1, 4))
def test_every_update_is_the_one_that_a_walk_finds(value: list[list[int]], draws: int) -> None:
    """Of rows of data, each of which the recipe counts once for every draw."""
    schedule, samples = batch_schedule([[start, rows * draws] for start, rows in value], draws), 0
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


MANY = st.builds(Shares, st.integers(1, 300), st.integers(1, 70), st.one_of(st.none(), st.integers(1, 40)))


@given(MANY)
def test_every_slot_is_one_row_of_one_replica(shares: Shares) -> None:
    assume(shares.replicas <= shares.global_batch)
    of_replicas = [shares.slots(replica) for replica in range(shares.replicas)]
    every = [slot for parts in of_replicas for part in parts for slot in part]
    assert every == list(range(shares.global_batch)), "in the order of the replicas"
    counts = [sum(map(len, parts)) for parts in of_replicas]
    assert counts == [shares.rows_of(replica) for replica in range(shares.replicas)]
    assert max(counts) == shares.share and min(counts) > 0 and max(counts) - min(counts) <= 1


@given(MANY)
def test_every_replica_computes_as_many_micro_batches_of_as_many_rows(shares: Shares) -> None:
    assume(shares.replicas <= shares.global_batch)
    assert shares.micro_batch <= (shares.largest or shares.share)
    assert shares.computed == shares.micro_batches * shares.micro_batch * shares.replicas >= shares.global_batch
    for replica in range(shares.replicas):
        parts = shares.slots(replica)
        assert len(parts) == shares.micro_batches
        assert all(len(part) == shares.micro_batch for part in parts[:-1]), "filler is in the last micro-batch only"
        assert len(parts[-1]) <= shares.micro_batch


@given(MANY)
def test_no_fewer_forwards_are_possible_and_the_rows_of_one_ask_for_themselves(shares: Shares) -> None:
    """What is used may be written into a recipe: it gives the same again."""
    limit = shares.largest or shares.share
    assert (shares.micro_batches - 1) * limit < shares.share <= shares.micro_batches * shares.micro_batch
    again = Shares(shares.global_batch, shares.replicas, shares.micro_batch)
    assert (again.micro_batch, again.micro_batches) == (shares.micro_batch, shares.micro_batches)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8))
def test_where_everything_divides_nothing_is_filler(replicas: int, micro_batches: int, rows: int) -> None:
    shares = Shares(replicas * micro_batches * rows, replicas, rows)
    assert (shares.micro_batch, shares.micro_batches, shares.filler, shares.remark) == (rows, micro_batches, 0.0, None)
    for replica in range(replicas):
        for index, part in enumerate(shares.slots(replica)):
            assert list(part) == [(replica * micro_batches + index) * rows + i for i in range(rows)]


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (Shares(512, 64, 8), None),
        (Shares(512, 56, None), "512 rows on 56 replicas: 10 or 9 each, 8.6 % of the computed rows are filler; one micro-batch of 10"),
        (
            Shares(512, 56, 8),
            "512 rows on 56 replicas: 10 or 9 each, 8.6 % of the computed rows are filler; "
            "2 micro-batches of 5 (parallel.micro_batch is 8)",
        ),
        (Shares(80, 8, 4), "80 rows on 8 replicas: 10 each, 16.7 % of the computed rows are filler; 3 micro-batches of 4"),
        (Shares(8, 2, 8), "8 rows on 2 replicas: 4 each; one micro-batch of 4 (parallel.micro_batch is 8)"),
    ],
)
def test_what_is_unexpected_is_said(shares: Shares, said: str | None) -> None:
    assert shares.remark == said
