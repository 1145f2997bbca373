"""Worlds that meet in one store after one another never take each other's words for their own."""

from __future__ import annotations

import datetime
import threading

import pytest
import torch.distributed as dist

from bd3_scale.distributed.rendezvous import meet, names
from bd3_scale.errors import TrainingError


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, timeout=datetime.timedelta(seconds=20))


def world(store: dist.TCPStore, size: int, late: int | None = None) -> set[str]:
    """The names that `size` ranks find, of which `late` comes after the others have looked."""
    names: list[str] = []

    def rank(number: int) -> None:
        client = dist.TCPStore("127.0.0.1", store.port, None, False, timeout=datetime.timedelta(seconds=20))
        names.append(meet(client, number, size, timeout=20))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size) if number != late]
    for thread in threads:
        thread.start()
    if late is not None:
        threads[0].join(0.3)
        threads.append(threading.Thread(target=rank, args=(late,)))
        threads[-1].start()
    for thread in threads:
        thread.join(30)
    assert len(names) == size
    return set(names)


@pytest.mark.parametrize("late", [0, 2])
def test_every_world_has_one_name_of_its_own(store: dist.TCPStore, late: int) -> None:
    """Ranks of the second world that are early find the words of the first, dead one; sizes change."""
    found = [world(store, 4), world(store, 3, late=late), world(store, 4, late=late)]
    assert all(len(names) == 1 for names in found) and len(set.union(*found)) == 3


def test_a_rank_that_never_starts_is_named(store: dist.TCPStore) -> None:
    with pytest.raises(TrainingError, match=r"rank 0 heard nothing from ranks 1, 2"):
        meet(store, 0, 3, timeout=0.2)
    with pytest.raises(TrainingError, match=r"rank 1 heard nothing from rank 0"):
        meet(store, 1, 3, timeout=0.2)


def test_missing_ranks_are_named_with_their_hosts() -> None:
    assert names({1, 2}, {0: "a"}, per_node=1) == "ranks 1, 2"
    assert names({3}, {0: "a"}, per_node=1) == "rank 3"
    assert (
        names({3, 8, 9, 10, 11, 12}, {0: "a", 1: "a", 13: "c"}, per_node=4)
        == "rank 3 (host a), ranks 8-11 (all of node 2), rank 12 (host c)"
    )
    assert names(range(1, 1024), {0: "a"}, per_node=1).endswith("16, ...")
