"""The ranks of a world meet under a name of their own, so that a restart never reads what an earlier world left in the store.

torchrun keeps one key-value store over its restarts (measured with torch 2.13: `--max-restarts` with c10d rendezvous), and the addresses
of the dead ranks stay in it: a rank that looks before its peer has written connects to a process that is gone, and the restart fails.
The number of restarts would not tell worlds apart, since a change of the number of nodes is not counted as one.

How: every rank says hello with a word that nobody used before and its host; rank 0 answers each word it finds with the name of the world
and goes on when every rank has taken the answer. Whoever waits says for whom (`distributed.waiting`): rank 0 names the ranks that are
missing, the others where they look for rank 0. Invariants: a rank only believes an answer to its own word, so an old answer cannot reach
it; the hello of a dead rank is answered in vain, since the living one overwrites it; no clock and no count of restarts is needed; no
rank waits inside the store, where it could not speak.
"""

from __future__ import annotations

import datetime
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Mapping
from itertools import groupby

import torch.distributed as dist

from bd3_scale.distributed.waiting import Waiting, waiting_for
from bd3_scale.errors import TrainingError, one_line
from bd3_scale.launcher import launched

PAUSE = 0.05
"""Seconds between two looks into the store."""
SHOWN = 16
"""Names in a line at most."""
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets, or whoever starts the ranks by hand."""


def reach(timeout: float) -> tuple[dist.Store, int, int]:
    """The store of which the environment tells, this rank and the number of ranks. The launcher holds the store, or rank 0 does.

    As torch's own `env://`, but that lets rank 0 wait for all others inside of the store, and in silence. Raises TrainingError.
    """
    absent = [name for name in NEEDED if not os.environ.get(name)]
    if absent:
        raise TrainingError(
            f"the ranks cannot meet: {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not in the environment; "
            f"set {', '.join(NEEDED)} for every rank, or start with torchrun"
        )
    rank, world_size = launched().rank, launched().world_size
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not launchers
    holder = "the launcher's store" if launchers else "rank 0"
    try:
        with waiting_for(lambda: f"{_me(rank)} tries to reach {holder} at {host}:{port} (MASTER_ADDR, MASTER_PORT)", speaks=_speaks()):
            store = dist.TCPStore(
                host,
                port,
                None,
                serves,
                timeout=datetime.timedelta(seconds=timeout),
                wait_for_workers=False,
                multi_tenant=not launchers,
                use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
            )
    except dist.DistError as error:
        why = one_line(error, 300)
        cure = "set MASTER_PORT to a free port, on all ranks" if serves else "set MASTER_ADDR to the host of rank 0, and start rank 0"
        raise TrainingError(f"{_me(rank)} cannot {'listen' if serves else f'reach {holder}'} at {host}:{port}: {why}; {cure}") from None
    return store, rank, world_size


def meet(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """The name of this world, the same on all its ranks and new for every world. Raises TrainingError after `timeout` seconds."""
    end, waiting = time.monotonic() + timeout, Waiting(speaks=_speaks())
    word = secrets.token_hex(8)
    store.set(f"hello/{rank}", f"{word} {socket.gethostname()}")
    if rank > 0:
        while not store.check([f"answer/{word}"]):
            waiting.look(lambda: f"{_me(rank)} has heard nothing from rank 0{_place()}")
            _pause(end, lambda: f"rank {rank} heard nothing from rank 0")
        name = store.get(f"answer/{word}").decode()
        store.set(f"taken/{name}/{word}", "")
        return name
    name = secrets.token_hex(8)
    answered: dict[int, str] = {}
    missing, hosts = set(range(1, world_size)), {0: socket.gethostname()}
    while missing:
        for other in sorted(missing):
            if not store.check([f"hello/{other}"]):
                continue
            hello, _, host = store.get(f"hello/{other}").decode().partition(" ")
            if answered.get(other) != hello:
                store.set(f"answer/{hello}", name)
                answered[other] = hello
            elif store.check([f"taken/{name}/{hello}"]):
                missing.discard(other)
                hosts[other] = host
        if missing:
            waiting.look(lambda: f"{world_size - len(missing)} of {world_size} ranks are here; missing: {names(missing, hosts)}{_place()}")
            _pause(end, lambda: f"rank 0 heard nothing from {names(missing, hosts)}")
    return name


def names(missing: Collection[int], hosts: Mapping[int, str], per_node: int | None = None) -> str:
    """ "ranks 1, 2", or where the launcher says how many ranks a node has: "rank 3 (host b), ranks 8-15 (all of node 1)".

    `hosts`: of the ranks that have come, which tell where the others of their node are.
    """
    per_node = per_node or launched().local_world_size
    if per_node == 1:
        return f"{ranks_text(sorted(missing)[:SHOWN])}{', ...' if len(missing) > SHOWN else ''}"
    found = []
    for node, group in groupby(sorted(missing), key=lambda rank: rank // per_node):
        ranks = list(group)
        host = next((hosts[rank] for rank in range(node * per_node, (node + 1) * per_node) if rank in hosts), None)
        at = f"host {host}" if host is not None else f"all of node {node}" if len(ranks) == per_node else f"node {node}"
        found.append(f"{ranks_text(ranks[:SHOWN])}{', ...' if len(ranks) > SHOWN else ''} ({at})")
    return f"{', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''}"


def ranks_text(ranks: list[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _speaks() -> bool:
    """One voice a host is enough."""
    return launched().local_rank == 0


def _me(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"


def _place() -> str:
    """Where all look for each other, as far as the environment says."""
    known = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    return f"; they are expected at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if known else ""


def _pause(end: float, problem: Callable[[], str]) -> None:
    if time.monotonic() > end:
        raise TrainingError(f"the ranks did not all start: {problem()}; see the other ranks' output, or raise parallel.timeout")
    time.sleep(PAUSE)
