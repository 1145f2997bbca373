"""Speaks for a torchrun that waits for other nodes, which itself says nothing: who has come, how many are wanted, and where.

    python -m bd3_scale.launching.meeting SINCE TORCHRUN-ARGUMENTS

`launching.node` starts this as a process of its own when torchrun has had no rank for a moment, and ends it when there is one: torch is
imported here and not there, and a store that does not answer hangs nobody. SINCE: the moment (time.monotonic) since when there is none.
Invariants: it only reads; it ends with its parent; one node alone needs nobody, and nothing is said.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from functools import partial

from bd3_scale.distributed.waiting import Waiting
from bd3_scale.launching import torchrun
from bd3_scale.launching.torchrun import Torchrun

LOOPBACK = ("127.", "localhost", "[::1]")


def described(told: Torchrun, hosts: list[str] | None, here: str) -> str:
    """For whom torchrun waits. `hosts`: who has come, None: nobody can say."""
    first = f"node {here}: torchrun has no rank yet; "
    if told.backend == "static":
        if told.node_rank == 0:
            text = f"{first}as node 0 of {told.nodes} it waits at {told.endpoint} for the others, and cannot say which"
        else:
            text = f"{first}as node {told.node_rank} of {told.nodes} it tries to reach node 0 at {told.endpoint}"
        if told.endpoint.startswith(LOOPBACK):
            text += "; that is this machine itself: set --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29400 for nodes that are apart"
        return text
    if hosts is None:
        return f"{first}nobody answers at {told.endpoint}, where {told.nodes} nodes are to meet; start the job on that node"
    if len(hosts) < told.least:
        came = f" ({', '.join(hosts[:16])}{', ...' if len(hosts) > 16 else ''})" if hosts else ""
        return f"{first}{len(hosts)} of {told.nodes} nodes have come to {told.endpoint}{came}; start the job on the others"
    return (
        f"{first}{len(hosts)} of {told.nodes} nodes are at {told.endpoint}, which is enough: ranks are about to start, or to end elsewhere"
    )


def main(arguments: list[str]) -> int:
    parent, waiting = os.getppid(), Waiting(began=float(arguments[0]))
    told = torchrun.read(arguments[1:])
    if told is None or told.most == 1:
        return 0
    while os.getppid() == parent:
        if waiting.due > torchrun.PATIENCE:
            time.sleep(0.2)
            continue
        hosts = torchrun.hosts_present(told) if told.backend == "c10d" else None
        time.sleep(max(0.0, waiting.due))
        waiting.look(partial(described, told, hosts, socket.gethostname()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
