"""What torchrun's command needs to find the other nodes, and whether the environment has it: for `python -m bd3_scale.doctor`.

`torchrun --nnodes 8 ... -m bd3_scale.train RECIPE` without more waits in silence: by default every node takes itself for the first one
and waits for the others at 127.0.0.1:29500 (torch 2.13). Before there are ranks, nothing of ours runs and could say so; asked, we do.
Invariant: nothing is started, listened to or connected to; names are looked up.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from bd3_scale.launching import torchrun
from bd3_scale.launching.node import JOINABLE

NEEDS = "torchrun on several nodes needs --rdzv-backend c10d --rdzv-endpoint HOST:PORT, or PET_RDZV_BACKEND and PET_RDZV_ENDPOINT"
CURE = "set PET_RDZV_BACKEND=c10d and PET_RDZV_ENDPOINT=FIRST_NODE:29400 on every node"


def meeting(environment: Mapping[str, str]) -> tuple[str, str, str]:
    """(ok | warn | fail, what is found, cure). `environment`: os.environ, which torchrun's own parser reads as well."""
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
