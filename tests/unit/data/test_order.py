"""The order is a permutation per epoch, local within its windows, and the same wherever reading begins."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.order import GlobalOrder, SkippingOrder
from bd3_scale.errors import DataError

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@given(shard_rows=SHARDS, seed=st.integers(0, 2**40), window=st.integers(1, 5), epoch=st.integers(0, 3))
def test_each_epoch_visits_every_sample_once(shard_rows: list[int], seed: int, window: int, epoch: int) -> None:
    order = GlobalOrder(shard_rows, seed, window)
    total = sum(shard_rows)
    assert order.epoch_samples == total
    assert sorted(order.sample_ids(epoch * total, total)) == list(range(total))


@given(shard_rows=SHARDS, window=st.integers(1, 5), position=st.integers(0, 200), counts=st.lists(st.integers(0, 40), max_size=6))
def test_the_order_does_not_depend_on_where_reading_begins(shard_rows: list[int], window: int, position: int, counts: list[int]) -> None:
    whole = GlobalOrder(shard_rows, 5, window).sample_ids(0, position + sum(counts))
    for count in counts:
        ids = GlobalOrder(shard_rows, 5, window).sample_ids(position, count)  # a fresh one: no state but the position
        assert ids.dtype == np.int64 and ids.tolist() == whole[position : position + count].tolist()
        position += count


def test_windows_are_whole_shards_mixed_together() -> None:
    order = GlobalOrder([10] * 12, seed=0, window=3)
    ids = order.sample_ids(0, 120).reshape(4, 30)
    shards = [set((window // 10).tolist()) for window in ids]
    assert [len(window) for window in shards] == [3, 3, 3, 3] and set.union(*shards) == set(range(12))
    assert all(len(set((window[:10] // 10).tolist())) > 1 for window in ids)  # not shard after shard (chance of a miss: 1e-7)


def test_epochs_and_seeds_differ() -> None:
    first = GlobalOrder([50] * 4, seed=0, window=4)
    orders = [first.sample_ids(0, 200), first.sample_ids(200, 200), GlobalOrder([50] * 4, seed=1, window=4).sample_ids(0, 200)]
    assert all((a == b).sum() < 20 for i, a in enumerate(orders) for b in orders[:i])  # one place in 200 agrees by chance


def test_every_sample_is_equally_likely_to_come_first() -> None:
    order = GlobalOrder([2, 2, 2, 2], seed=3, window=2)
    counts = np.bincount([int(order.sample_ids(8 * epoch, 1)[0]) for epoch in range(4000)], minlength=8)
    assert (np.abs(counts - 500) < 5 * np.sqrt(500 * 7 / 8)).all()


def test_the_order_is_what_it_was() -> None:
    """Golden: another order would make every older checkpoint resume as another run."""
    assert GlobalOrder([3, 4, 2, 5], seed=7, window=2).sample_ids(12, 8).tolist() == [10, 1, 4, 3, 1, 5, 2, 6]


def test_a_jump_costs_a_window_not_the_data_set() -> None:
    order = GlobalOrder([8000] * 2500, seed=0, window=16)  # 20 M samples: 160 MB as a permutation
    tracemalloc.start()
    ids = order.sample_ids(200_000_000 + 12_345_678, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 8000 * 8 * 6
    assert len(set(ids.tolist())) == 512 and len(set((ids // 8000).tolist())) <= 16


@given(
    shard_rows=SHARDS, window=st.integers(1, 5), position=st.integers(0, 100), cuts=st.lists(st.floats(0.01, 0.99), max_size=3, unique=True)
)
def test_shares_of_a_window_have_the_shards_of_their_samples(shard_rows: list[int], window: int, position: int, cuts: list[float]) -> None:
    order, count = GlobalOrder(shard_rows, 5, window), 12
    shards = np.searchsorted(np.cumsum(shard_rows), order.sample_ids(position, count), side="right")
    places = order.window_places(position, count)
    borders = [0.0, *sorted(cuts), 1.0]
    shares = list(itertools.pairwise(borders))
    parts = [order.shards(position, count, 0, share)[0] for share in shares]
    for shard, place in zip(shards.tolist(), places.tolist(), strict=True):
        assert all(shard in part for part, (first, stop) in zip(parts, shares, strict=True) if first <= place < stop)
    assert {shard for part in parts for shard in part} >= {s for s in order.shards(position, count, 0)[0] if shard_rows[s]}


def test_half_a_million_shards_are_no_burden() -> None:
    rows = np.random.default_rng(0).integers(380, 420, 500_000)
    tracemalloc.start()
    order = GlobalOrder(rows, seed=0, window=16)  # 200 M samples
    ids = order.sample_ids(200_000_000 + 12_345, 512)
    assert tracemalloc.get_traced_memory()[1] < 50e6 and tracemalloc.get_traced_memory()[0] < 25e6
    tracemalloc.stop()
    shards = set((np.searchsorted(np.cumsum(rows), ids, side="right")).tolist())
    assert shards <= set(order.shards(200_000_000 + 12_345, 512, 0)[0]) and len(shards) <= 32


@given(shard_rows=SHARDS, window=st.integers(1, 4), position=st.integers(0, 150), count=st.integers(1, 40), ahead=st.integers(0, 6))
def test_the_shards_that_are_said_to_be_needed_are(shard_rows: list[int], window: int, position: int, count: int, ahead: int) -> None:
    order = GlobalOrder(shard_rows, 5, window)
    needed, following = order.shards(position, count, ahead)
    first = np.cumsum([0, *shard_rows])
    read = np.searchsorted(first, order.sample_ids(position, count), side="right") - 1
    assert set(read.tolist()) <= set(needed) and len(needed) <= order.shards_at_once(count)
    everything = order.shards(position, count, len(shard_rows))[1]
    assert following == everything[:ahead] and not set(needed) & set(everything), "the nearest first"
    rest = set(range(len(shard_rows))) - set(needed) - set(everything)
    assert not any(shard_rows[shard] for shard in rest), "only empty shards never come"
    later = order.sample_ids(position + count, 2 * order.epoch_samples)
    shards = np.searchsorted(first, later, side="right") - 1
    come = [int(np.argmax(shards == shard)) for shard in everything if shard_rows[shard]]
    for nearer, farther in zip(come, come[window:], strict=False):
        assert nearer < farther, "more than a window apart, the earlier one is read first"


CUTS = st.lists(st.integers(0, 120), min_size=0, max_size=6, unique=True).map(sorted)


@given(shard_rows=SHARDS, cuts=CUTS, position=st.integers(0, 100), count=st.integers(0, 40))
def test_samples_left_out_are_those_of_the_ranges(shard_rows: list[int], cuts: list[int], position: int, count: int) -> None:
    ranges = [list(pair) for pair in zip(cuts[::2], cuts[1::2], strict=False)]
    order = GlobalOrder(shard_rows, 5, 2)
    skipping = SkippingOrder(order, ranges)
    left = [place for place in range(400) if not any(first <= place < stop for first, stop in ranges)]
    expected = [order.sample_ids(place, 1)[0] for place in left[position : position + count]]
    assert skipping.sample_ids(position, count).tolist() == expected
    assert skipping.window_places(position, count).tolist() == [order.window_places(p, 1)[0] for p in left[position : position + count]]
    read = np.searchsorted(np.cumsum([0, *shard_rows]), expected, side="right") - 1
    needed, following = skipping.shards(position, count, 2)
    assert set(read.tolist()) <= set(needed) and not set(needed) & set(following)


def test_no_rows_is_an_error_for_people() -> None:
    with pytest.raises(DataError, match="has no rows"):
        GlobalOrder([0, 0], 0, 1)
