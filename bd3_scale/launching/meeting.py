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
from collections.abc import Mapping
from functools import partial

from bd3_scale.distributed.waiting import Waiting
from bd3_scale.launching import torchrun
from bd3_scale.launching.node import JOINABLE
from bd3_scale.launching.torchrun import Torchrun

LOOPBACK = ("127.", "localhost", "[::1]")
NEEDS = "torchrun on several nodes needs --rdzv-backend c10d --rdzv-endpoint HOST:PORT, or PET_RDZV_BACKEND and PET_RDZV_ENDPOINT"
CURE = "set PET_RDZV_BACKEND=c10d and PET_RDZV_ENDPOINT=FIRST_NODE:29400 on every node"


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


def advice(environment: Mapping[str, str]) -> tuple[str, str, str]:
    """(ok | warn | fail, what is found, cure): what torchrun's command needs to find the other nodes, and whether `environment`
    (os.environ, which torchrun's own parser reads as well) has it. Names are looked up, nothing is connected to.

    `torchrun --nnodes 8 ... -m bd3_scale.train RECIPE` without more waits in silence: by default every node takes itself for the first one
    and waits for the others at 127.0.0.1:29500 (torch 2.13).
    """
    told = torchrun.read(["training"])
    if told is None:
        return "fail", "torchrun does not accept PET_NNODES in the environment", "set PET_NNODES=N or LEAST:MOST, or unset it"
    if not (environment.get("PET_RDZV_ENDPOINT") or environment.get("PET_MASTER_ADDR")):
        wanted = max(told.most, int(environment.get("SLURM_JOB_NUM_NODES", "1")))
        if wanted > 1:
            return "warn", f"{wanted} nodes, but {NEEDS} in the environment; none is set here", CURE
        return "ok", f"one node needs nothing; {NEEDS} in the environment (none is set here)", ""
    host, port = told.place
    if told.backend == "static" and not environment.get("PET_NODE_RANK"):
        return "warn", f"{host}:{port} is set, but nothing tells this node's place (PET_NODE_RANK)", CURE
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        text = f"{host}, where the nodes are to meet, is not to be found ({error.strerror})"
        return "fail", text, "set PET_RDZV_ENDPOINT to a name or an address that all nodes know"
    if told.least < told.most and environment.get(JOINABLE) != "1":
        text = f"{told.nodes} nodes by PET_NNODES, but with torchrun by itself none can join later: {JOINABLE} is not 1"
        return "warn", text, f"set {JOINABLE}=1 on every node, or start with bd3_scale.launching.node, which does"
    return "ok", f"torchrun's command needs no more: {told.backend} at {host}:{port}, {told.nodes} node(s) by PET_NNODES unless it says", ""


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
