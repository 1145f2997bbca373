"""Whatever the number of replicas, a global batch is shared exactly: every slot once, the same forwards on all."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bd3_scale.recipe.shares import Shares

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
