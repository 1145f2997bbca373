"""torchrun's elastic mode: a node that is lost does not end the run; the others restart by themselves at the new size and continue."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.distributed.conftest import metrics
from tests.distributed.launch import ROOT, give_turn, launch, take_turn

COMMON = ["training.steps=40", "training.global_batch=7", "checkpoint.every=4", "parallel.micro_batch=1"]
"""7 rows: four ranks take 2 or 1 of them, the two that are left 4 and 3."""


class Node:
    """One launcher and its ranks, as a node of a cluster would run it: `torchrun --nnodes 1:2`."""

    def __init__(self, port: int, arguments: list[str], log: Path, ranks: int = 2, restarts: int = 3, **variables: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2"]
        command += ["--max-restarts", str(restarts), "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic"]
        # How long it waits for more nodes where there are enough: 30 s by default.
        command += ["--rdzv-conf", "last_call_timeout=5", "-m", "bd3_scale.train", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT), **variables}
        self.log, self.port = log, port
        with open(log, "w") as output:
            self.process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True)

    def holds_the_store(self) -> bool:
        """Whether the rendezvous' store is with this node: a launcher may listen at other ports, too, for its own ranks."""
        return any(at.status == psutil.CONN_LISTEN and at.laddr.port == self.port for at in self.process.net_connections("tcp"))

    def lose(self) -> None:
        """The node is gone: its launcher and its ranks, at once."""
        gone = [self.process, *self.process.children(recursive=True)] if self.process.is_running() else []
        for one in gone:
            try:
                one.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


@pytest.fixture
def nodes(recipe: Path, tmp_path: Path) -> Iterator[list[Node]]:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    take_turn(2)  # of more, which mostly wait
    arguments = [str(recipe), f"run.dir={tmp_path / 'run'}", *COMMON, "parallel.heartbeat=4"]
    started = [Node(port, arguments, tmp_path / f"node-{number}.log") for number in range(2)]
    yield started
    for node in started:
        node.lose()
    give_turn()


def test_lost_node_shrinks_the_run(nodes: list[Node], recipe: Path, tmp_path: Path) -> None:
    file, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_text().count('"train"') < 10:
        assert time.monotonic() < end and all(node.process.is_running() for node in nodes), [node.log.read_text()[-2000:] for node in nodes]
        time.sleep(0.05)
    # The store of the rendezvous is with the node that came first, and must stay.
    store = next(node for node in nodes if node.holds_the_store())
    lost = next(node for node in nodes if node is not store)
    lost.lose()
    status = store.process.wait(200)
    output = store.log.read_text()
    assert status == 0, output[-6000:]
    assert "7 rows on 2 replicas: 4 or 3 each, 12.5 % of the computed rows are filler; 4 micro-batches of 1" in output
    assert "is gone" in output or "has not answered" in output, "the loss was not noticed by the guard"
    finished = launch(1, ["-m", "bd3_scale.train", str(recipe), f"run.dir={tmp_path / 'whole'}", *COMMON], tmp_path / "log")
    assert finished.status == 0, finished.output[-4000:]
    for kind, key in (("train", "loss"), ("validation", "nelbo")):
        found, expected = (
            [(line["step"], line[key]) for line in metrics(tmp_path / run) if line["kind"] == kind] for run in ("run", "whole")
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)
