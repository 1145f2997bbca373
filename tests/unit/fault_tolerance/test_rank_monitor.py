"""The monitor of ranks, here as threads of one process over a store of their own: who is named, why, and who is not."""

from __future__ import annotations

import datetime
import subprocess
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from bd3_scale.errors import DataError, TrainingError
from bd3_scale.fault_tolerance import rank_monitor as module
from bd3_scale.fault_tolerance.rank_monitor import Beat, RankMonitor, Work, is_lost_peer, named_behind

PATIENCE = 1.2
LIMIT = 30.0
CLOSED = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")


class World:
    """A store and the monitors around it; `ends` holds what each would have said when it ended its process."""

    def __init__(self, size: int = 2) -> None:
        self.server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, timeout=datetime.timedelta(seconds=5))
        self.size = size
        self.ends: dict[int, tuple[str | None, float]] = {}
        self.ended: dict[int, threading.Event] = {}
        self.monitors: list[RankMonitor] = []

    def monitor(self, rank: int, patience: float = PATIENCE, local_ranks: range | None = None) -> RankMonitor:
        self.ended[rank] = threading.Event()

        def end(line: str | None, linger: float) -> None:
            self.ends[rank] = line, linger
            self.ended[rank].set()

        made = RankMonitor(rank, self.size, patience, local_ranks=local_ranks or range(self.size), end=end)
        self.monitors.append(made)
        return made

    def wait(self, rank: int) -> str:
        assert self.ended[rank].wait(LIMIT), f"rank {rank} did not end; {self.ends}"
        return self.ends[rank][0] or ""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], World]]:
    monkeypatch.setattr(module, "_monitors", Counter())
    monkeypatch.setattr(module, "GRACE", 0.2)
    worlds = []

    def make(size: int = 2) -> World:
        worlds.append(World(size))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(worlds[-1].server.port))
        return worlds[-1]

    yield make
    for made in worlds:
        for monitor in made.monitors:
            silence(monitor)


def silence(monitor: RankMonitor) -> None:
    """The thread ends without a word, as that of a process that is no more."""
    monitor._closing.set()
    if monitor._thread is not None:
        monitor._thread.join()


def test_one_process_has_no_thread() -> None:
    before = threading.active_count()
    with RankMonitor(0, 1, PATIENCE):
        assert threading.active_count() == before


def test_ranks_that_leave_in_order_are_not_missed(world: Callable[[int], World]) -> None:
    here = world(3)
    with here.monitor(0):
        for rank in (1, 2):
            with here.monitor(rank):
                time.sleep(PATIENCE / 2)
        time.sleep(2 * PATIENCE)
    assert not here.ends


def test_silent_ranks_are_named_with_their_step(world: Callable[[int], World]) -> None:
    """Two ranks of a lost node; the third, on another host, is told by the leader and lingers as the leader does."""
    here = world(4)
    with here.monitor(0, local_ranks=range(2)), here.monitor(1, local_ranks=range(2)), ExitStack() as stack:
        for rank in (2, 3):
            lost = here.monitor(rank, local_ranks=range(2, 4))
            stack.enter_context(lost.following(Work(progress=lambda: 17)))
            lost.__enter__()
            silence(lost)
        line = here.wait(0)
        here.wait(1)
    assert "bd3_scale: error: rank " in line and "at step 17) and rank " in line and f"not answered for {PATIENCE:g} s" in line
    named = line.split(") and rank ")[1].split()[0], line.split("error: rank ")[1].split()[0]
    assert set(named) == {"2", "3"}
    assert here.ends[0][1] > 0
    assert here.ends[1][0] is None, "the leader has said it for this host"


def test_work_that_ended_in_order_is_let_go_of_and_one_that_failed_has_its_last_words() -> None:
    """Between training and the sample the state of the training must go; an error is still to be told of, with the stacks."""

    class Trained:
        step = 7

    monitor, said, trained = RankMonitor(0, 1, PATIENCE), list[str](), Trained()
    seen = weakref.ref(trained)
    with monitor.following(Work(progress=lambda held=trained: held.step, on_verdict=lambda held=trained: said.append("words"))):
        assert monitor._now().step == 7
    del trained
    assert monitor._now().step == 7 and seen() is None
    with pytest.raises(DataError), monitor.following(Work(on_verdict=lambda: said.append("words"))):
        raise DataError("x")
    monitor._work.on_verdict()
    assert said == ["words"]


def test_lost_leader_is_noticed_by_all(world: Callable[[int], World]) -> None:
    here = world(3)
    silence(here.monitor(0, local_ranks=range(1)).__enter__())
    with here.monitor(1, local_ranks=range(1, 2)), here.monitor(2, local_ranks=range(2, 3)):
        assert all("error: rank 0 (host" in here.wait(rank) for rank in (1, 2))
    assert here.ends[1][0] == here.ends[2][0], "one verdict"


def test_rank_that_never_came_is_named(world: Callable[[int], World]) -> None:
    here = world(2)
    with here.monitor(0):
        assert "rank 1 (not heard of yet) has not answered" in here.wait(0)


@pytest.mark.parametrize("store_too", [False, True])
def test_killed_process_of_this_host_is_named_long_before_its_heartbeat_is_missed(world: Callable[[int], World], store_too: bool) -> None:
    here = world(2)
    process = subprocess.Popen(["sleep", "600"])
    victim = here.monitor(1, patience=600)
    victim._beat = replace(victim._beat, pid=process.pid)
    victim.__enter__()
    with here.monitor(0, patience=600):
        assert not here.ended[0].wait(1.5)
        process.kill()  # a zombie from here on
        if store_too:
            del here.server
        line = here.wait(0)
        process.wait()
    assert f"rank 1 (host {victim._beat.host}, pid {process.pid}, last heard of at step 0) is gone" in line


def test_the_rank_that_the_others_wait_for_is_named() -> None:
    """Two pipelines of two stages: rank 2 hangs before a reduction with 3, which waits for it; 0 and 1 wait for these in the world."""

    def beat(rank: int, **collectives: int) -> Beat:
        return Beat(rank, f"host{rank}", 100 + rank, "", step=7, collectives=collectives)

    beats = [beat(0, world=9, a=5), beat(1, world=9, a=5), beat(2, world=8, b=4), beat(3, world=8, b=5)]
    text = named_behind(beats)
    assert "wait for rank 2 (host host2, pid 102, last heard of at step 7), behind" in text and "host3" not in text
    assert named_behind([beat(0, world=9), beat(1, world=9)]) == "", "a device hangs, not a host: nothing tells them apart"


def test_error_of_a_rank_is_told_to_the_others(world: Callable[[int], World]) -> None:
    here = world(2)
    with here.monitor(0):
        with pytest.raises(DataError, match=r"^shard 3 is damaged$"), here.monitor(1):
            raise DataError("shard 3 is damaged")
        line = here.wait(0)
    assert "error: rank 1 (host" in line and line.endswith("ended: shard 3 is damaged")


def test_failed_collective_becomes_the_name_of_the_dead_rank(world: Callable[[int], World]) -> None:
    here = world(2)
    silence(here.monitor(1).__enter__())
    with pytest.raises(TrainingError, match=r"^rank 1 \(host .* has not answered"), here.monitor(0):
        raise CLOSED
    assert "rank 1 (host" in here.wait(0) and here.wait(0).endswith(f"[this rank saw: {CLOSED}]")


def test_failed_collective_among_living_ranks_keeps_its_text(world: Callable[[int], World]) -> None:
    here = world(2)
    with here.monitor(0):
        with pytest.raises(TrainingError, match=r"all ranks answer, but a collective failed: .*Connection closed by peer"), here.monitor(1):
            raise CLOSED
        assert "error: rank 1 (host" in here.wait(0) and "Connection closed by peer" in here.wait(0)


def test_rank_that_was_asleep_accuses_nobody(world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch) -> None:
    here, offset = world(2), [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + offset[0], sleep=time.sleep))
    with here.monitor(0), here.monitor(1):
        for _ in range(3):
            time.sleep(PATIENCE / 2)
            offset[0] += 1000
        time.sleep(PATIENCE)
    assert not here.ends


def test_lost_store_ends_the_rank_but_a_lost_connection_does_not(world: Callable[[int], World]) -> None:
    another, here = World(), world(2)
    with here.monitor(0) as first, here.monitor(1):
        first._store = dist.PrefixStore("", dist.TCPStore("127.0.0.1", another.server.port, None, False, wait_for_workers=False))
        del another.server
        time.sleep(3 * PATIENCE)
        assert not here.ends
        del here.server
        assert all("error: the store by which the ranks found each other does not answer" in here.wait(rank) for rank in (0, 1))


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (CLOSED, True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_only_errors_of_the_other_side_wait_for_a_verdict(error: Exception, lost: bool) -> None:
    assert is_lost_peer(error) is lost
