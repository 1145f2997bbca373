"""What torchrun was told is read as it reads it itself, and the line about who is missing says what is known and nothing else."""

from __future__ import annotations

import base64
import datetime
import os
import pickle

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

from bd3_scale.launching import torchrun
from bd3_scale.launching.meeting import described
from bd3_scale.launching.torchrun import Torchrun

COMMAND = ["--nproc-per-node", "8", "-m", "bd3_scale.train", "recipes/owt_1b.yaml", "training.steps=1"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)


def test_options_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun.read(COMMAND) == Torchrun(1, 1, "c10d", "localhost:0", "none", 0)
    assert torchrun.read(["--nnodes", "8", *COMMAND]) == Torchrun(8, 8, "static", "127.0.0.1:29500", "none", 0)
    assert torchrun.read(["--nnodes", "8", "--master-addr", "fd00::1", *COMMAND]).place == ("fd00::1", 29500)  # type: ignore[union-attr]
    monkeypatch.setenv("PET_RDZV_BACKEND", "c10d")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "first:29400")
    monkeypatch.setenv("PET_NNODES", "4:8")
    assert torchrun.read(COMMAND) == Torchrun(4, 8, "c10d", "first:29400", "none", 0)
    assert torchrun.read(["--nnodes=2", "--rdzv_id", "x", *COMMAND]) == Torchrun(2, 2, "c10d", "first:29400", "x", 0)
    assert torchrun.read(["--nnodes", "two", *COMMAND]) is None and torchrun.read(["--no-such-option", *COMMAND]) is None


def test_lines_name_who_has_come_and_the_place() -> None:
    told = Torchrun(4, 8, "c10d", "first:29400", "x", 0)
    assert "nobody answers at first:29400, where 4 to 8 nodes are to meet" in described(told, None, "me")
    assert "2 of 4 to 8 nodes have come to first:29400 (a, b); start the job on the others" in described(told, ["a", "b"], "me")
    assert "is enough" in described(told, ["a", "b", "c", "d"], "me")
    static = Torchrun(8, 8, "static", "127.0.0.1:29500", "none", 0)
    assert "this machine itself: set --rdzv-backend c10d" in described(static, None, "me")
    assert "as node 3 of 8 it tries to reach node 0 at first:29500" in described(
        Torchrun(8, 8, "static", "first:29500", "none", 3), None, "me"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_hosts_are_read_from_the_state_of_a_rendezvous(host: str) -> None:
    store = dist.TCPStore(host, 0, None, True, wait_for_workers=False, timeout=datetime.timedelta(seconds=20))
    place = f"[{host}]" if ":" in host else host
    told, state = Torchrun(3, 3, "c10d", f"{place}:{store.port}", "x", 0), _RendezvousState()
    C10dRendezvousBackend(store, "x")  # the key is there, a state is not
    assert torchrun.hosts_present(told) == []
    node = _NodeDesc("a", 1, 0)
    state.participants[node], state.last_heartbeats[node] = 0, datetime.datetime.now(datetime.UTC)
    state.wait_list.add(_NodeDesc("b", 2, 0))
    store.set("torch.rendezvous.x", base64.b64encode(pickle.dumps(state)))
    assert torchrun.hosts_present(told) == ["a", "b"]


def test_only_a_rendezvous_is_read_from_the_store() -> None:
    """Whoever can write into the store cannot have code run here."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, timeout=datetime.timedelta(seconds=20))
    told = Torchrun(2, 2, "c10d", f"127.0.0.1:{store.port}", "x", 0)
    assert torchrun.hosts_present(told) == []
    module = b"torch.distributed.elastic.rendezvous.dynamic_rendezvous"
    through = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c\x0cpickle.loads\x93."  # a name inside of a module that is known
    for hostile in (pickle.dumps(print), through):
        store.set("torch.rendezvous.x", base64.b64encode(hostile))
        assert torchrun.hosts_present(told) is None
    assert torchrun.hosts_present(Torchrun(2, 2, "c10d", "127.0.0.1:1", "x", 0)) is None
