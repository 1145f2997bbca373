"""What torchrun was told, and who has come: how many nodes it may have, where they meet, which of them are there.

torchrun tells its ranks the size of the world that there is, not the sizes that there may be, and says nothing while it waits for
nodes. Its own parser knows: options on its command line, else PET_* variables (PET_NNODES, PET_RDZV_BACKEND, PET_RDZV_ENDPOINT, ...;
measured with torch 2.13), else defaults. Who has come stands in the store of the c10d rendezvous, whose keys and classes are torch's
own affair: whatever cannot be read is None here, never an error. Invariant: what comes from the store may name torch's rendezvous
classes and dates, and nothing else is loaded.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import io
import pickle
import socket
from dataclasses import dataclass
from typing import Any

LAUNCHERS = ("torchrun", "torch.distributed.run", "torch/distributed/run.py", "torch.distributed.launch")
"""How the word on a command line ends after which torchrun's arguments come."""
KNOWN = {
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous": {"_RendezvousState", "_NodeDesc"},
    "datetime": {"datetime", "timedelta", "timezone"},
    "builtins": {"set"},
}
"""What the state of a rendezvous is made of."""
EMPTY = b"canimadam"
"""What torch's c10d backend writes before there is a state."""
PATIENCE = 2.0
"""Seconds for the store to answer."""


@dataclass(frozen=True)
class Torchrun:
    least: int
    most: int
    """Nodes."""
    backend: str
    """static: the number of nodes and the place of each are given; others: they are found, and may change."""
    endpoint: str
    """HOST:PORT."""
    run_id: str
    node_rank: int
    """Only with static."""

    @property
    def nodes(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least} to {self.most}"

    @property
    def place(self) -> tuple[str, int]:
        """Host and port. Raises ValueError for an endpoint that torchrun does not read."""
        from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

        host, port = parse_rendezvous_endpoint(self.endpoint, 29400)  # torch's DEFAULT_PORT of c10d
        return host, port


def read(arguments: list[str]) -> Torchrun | None:
    """What these arguments, and PET_* in the environment, tell torchrun; None where its parser refuses them."""
    from torch.distributed.run import get_args_parser, parse_min_max_nnodes

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            told = get_args_parser().parse_args(arguments)
        least, most = parse_min_max_nnodes(told.nnodes)
    except (SystemExit, RuntimeError, ValueError):
        return None
    backend, endpoint = told.rdzv_backend, told.rdzv_endpoint
    if told.standalone or (backend == "static" and not endpoint and most == 1):
        backend, endpoint = "c10d", "localhost:0"
    elif backend == "static" and not endpoint:
        host = f"[{told.master_addr}]" if ":" in told.master_addr else told.master_addr
        endpoint = f"{host}:{told.master_port or 29500}"
    return Torchrun(least, most, backend, endpoint, told.rdzv_id, told.node_rank)


def of_this_rank() -> Torchrun | None:
    """What the torchrun was told that started this process, or a process above it; None where there is none."""
    import psutil

    try:
        above = [parent.cmdline() for parent in psutil.Process().parents()]
    except psutil.Error:
        return None
    for words in above:
        for place, word in enumerate(words[:8]):
            if word.endswith(LAUNCHERS):
                return read(words[place + 1 :])
    return None


def hosts_present(told: Torchrun) -> list[str] | None:
    """The hosts of the nodes that have come to a c10d rendezvous, first come first; None where nobody answers there."""
    import torch.distributed as dist

    try:
        host, port = told.place
        with socket.create_connection((host, port), timeout=PATIENCE):
            pass  # TCPStore itself would try for long and print its own traces
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=PATIENCE))
        key = f"torch.rendezvous.{told.run_id}"
        written = base64.b64decode(store.get(key)) if store.check([key]) else EMPTY
        if written == EMPTY:
            return []
        state = _State(io.BytesIO(written)).load()
        return [node.addr for node in (*state.participants, *state.wait_list)]
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, EOFError, AttributeError):
        return None


class _State(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong to a rendezvous")
