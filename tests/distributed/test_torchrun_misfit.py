"""An elastic world that became too small for its layout waits for nodes, uses up no restart by it, and goes on when one has joined."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from bd3_scale.launching.node import JOINABLE
from tests.distributed.conftest import metrics
from tests.distributed.launch import give_turn, launch, take_turn
from tests.distributed.test_torchrun_elastic import Node

COMMON = ["training.steps=40", "checkpoint.every=4", "parallel.tensor=2"]
WAITS = "bd3_scale: 1 ranks do not fit this recipe (the world of 1 ranks must be a multiple of parallel.tensor"


@pytest.fixture
def start(recipe: Path, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts a node of one rank, of a job of one or two nodes that may be restarted once."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    take_turn(2)  # of more, which mostly wait
    started: list[Node] = []

    def node(*overrides: str) -> Node:
        arguments = [str(recipe), f"run.dir={tmp_path / 'run'}", *COMMON, "parallel.heartbeat=4", *overrides]
        started.append(Node(port, arguments, tmp_path / f"node-{len(started)}.log", ranks=1, restarts=1, **{JOINABLE: "1"}))
        return started[-1]

    yield node
    for one in started:
        one.lose()
    give_turn()


def until(nodes: list[Node], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end and all(node.process.is_running() for node in nodes), [node.log.read_text()[-3000:] for node in nodes]
        time.sleep(0.05)


def test_lost_node_is_waited_for(start: Callable[..., Node], recipe: Path, tmp_path: Path) -> None:
    nodes, file = [start(), start()], tmp_path / "run" / "metrics.jsonl"
    until(nodes, lambda: file.exists() and file.read_text().count('"train"') >= 10)
    stays = next(node for node in nodes if node.holds_the_store())
    next(node for node in nodes if node is not stays).lose()  # its ranks fail: the one restart that there is
    until([stays], lambda: WAITS in stays.log.read_text())
    until([stays], lambda: json.loads((tmp_path / "run" / "heartbeat.json").read_text())["doing"] == "wait")
    assert "2 would: waiting for nodes to join" in stays.log.read_text()
    back = start()
    assert [node.process.wait(200) for node in (stays, back)] == [0, 0], [node.log.read_text()[-6000:] for node in (stays, back)]
    finished = launch(2, ["-m", "bd3_scale.train", str(recipe), f"run.dir={tmp_path / 'whole'}", *COMMON], tmp_path / "log")
    assert finished.status == 0, finished.output[-4000:]
    for kind, key in (("train", "loss"), ("validation", "nelbo")):
        found, expected = (
            [(line["step"], line[key]) for line in metrics(tmp_path / run) if line["kind"] == kind] for run in ("run", "whole")
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_wait_ends_when_asked_and_a_hopeless_recipe_does_not_wait(start: Callable[..., Node]) -> None:
    node = start()
    until([node], lambda: WAITS in node.log.read_text())
    (rank,) = [child for child in node.process.children() if "bd3_scale.train" in child.cmdline()]
    os.kill(rank.pid, signal.SIGTERM)
    psutil.wait_procs([node.process], timeout=60)
    assert node.process.wait(60) == 0 and "leaving; nothing is lost" in node.log.read_text()
    hopeless = start("parallel.tensor=4")  # one or two ranks are all that may come
    assert hopeless.process.wait(120) != 0
    output = hopeless.log.read_text()
    assert "must be a multiple of parallel.tensor x parallel.pipeline = 4" in output and "waiting for nodes" not in output
