"""Ranks started by hand, one after another: whoever waits says for whom and where, leaves when asked, goes on when all are here."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT

RANK = """
import sys
from bd3_scale.distributed import waiting
from bd3_scale.fault_tolerance.early_exit import exit_on_early_signal
waiting.FIRST = 0.2
from bd3_scale.distributed.rendezvous import meet, reach
with exit_on_early_signal(leader=True):
    store, rank, world_size = reach(120)
    print("world", meet(store, rank, world_size, 120), flush=True)
    store.add("left", 1)  # rank 0 holds the store and leaves last
    while rank == 0 and store.add("left", 0) < world_size:
        pass
"""


class Rank:
    def __init__(self, rank: int, port: int, folder: Path) -> None:
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
            environment.pop(name, None)
        self.log = folder / f"rank-{rank}.log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen([sys.executable, "-c", RANK], stdout=output, stderr=output, cwd=ROOT, env=environment)

    def says(self, pattern: str) -> None:
        """Wait until it has."""
        end = time.monotonic() + 90
        while not re.search(pattern, self.log.read_text()):
            assert time.monotonic() < end and self.process.poll() is None, (pattern, self.log.read_text()[-2000:])
            time.sleep(0.1)


@pytest.fixture
def port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@pytest.fixture
def started() -> Iterator[list[Rank]]:
    ranks: list[Rank] = []
    yield ranks
    for one in ranks:
        one.process.kill()
        one.process.wait()


def test_who_waits_says_for_whom(started: list[Rank], port: int, tmp_path: Path) -> None:
    early = Rank(1, port, tmp_path)
    started.append(early)
    early.says(rf"bd3_scale: waiting for \d+ s: rank 1 on \S+ tries to reach rank 0 at 127\.0\.0\.1:{port} ")
    leader = Rank(0, port, tmp_path)
    started.append(leader)
    leader.says(rf"2 of 3 ranks are here; missing: rank 2; they are expected at 127\.0\.0\.1:{port}\n")
    started.append(Rank(2, port, tmp_path))
    assert [one.process.wait(90) for one in started] == [0, 0, 0], [one.log.read_text() for one in started]
    worlds = [re.findall(r"^world \w+$", one.log.read_text(), re.M) for one in started]
    assert worlds[0] == worlds[1] == worlds[2] and len(worlds[0]) == 1


def test_who_waits_leaves_when_asked(started: list[Rank], port: int, tmp_path: Path) -> None:
    """Also out of the call that looks for rank 0, which may last for parallel.timeout seconds."""
    lonely = Rank(1, port, tmp_path)
    started.append(lonely)
    lonely.says("tries to reach rank 0")
    lonely.process.send_signal(signal.SIGTERM)
    assert lonely.process.wait(60) == 0
