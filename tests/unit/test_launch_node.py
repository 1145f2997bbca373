"""bd3_scale.launching.node: a stop reaches the ranks of a node and nothing else, and the status says how the run stands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bd3_scale.launching import node
from bd3_scale.launching.node import UNFINISHED, Node

LAUNCHER = """
import os, signal, subprocess, sys, time
folder, mode = sys.argv[1:]
attempts = os.path.join(folder, "attempts")
open(attempts, "a").write("x")
if mode == "lonely":
    time.sleep(60)
if mode == "late" and len(open(attempts).read()) < 3:
    sys.exit(1)
assert os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] == "SIGINT"
os.kill(os.getpid(), signal.SIGTERM)  # what SLURM sends to all processes of a job: not heard here
rank = subprocess.Popen([sys.executable, "-c", sys.argv[0]])
sys.exit(rank.wait())
"""
RANK = """
import json, os, signal, sys, time
folder = {folder!r}
def leave(number, frame):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as `early_exit` has it: told again while Python ends, it would die of it
    json.dump({{"doing": "stopped", "number": number}}, open(os.path.join(folder, "heartbeat.json"), "w"))
    sys.exit(0)
time.sleep(0.5)  # not listening yet: what comes now is lost, and does not end it
signal.signal(signal.SIGUSR1, leave)
open(os.path.join(folder, "listening"), "w")
time.sleep({seconds})
json.dump({{"doing": "finished"}}, open(os.path.join(folder, "heartbeat.json"), "w"))
"""


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, seconds: float = 60.0, patience: float = 0.0) -> Node:
    """A node whose torchrun is a stand-in with one rank."""
    rank = RANK.format(folder=str(folder), seconds=seconds)
    program = LAUNCHER.replace("sys.argv[0]", repr(rank))
    monkeypatch.setattr(node, "TORCHRUN", [sys.executable, "-c", program])
    for name, value in (("AGAIN", 0.2), ("LONELY", 0.5), ("PAUSE", 0.1)):
        monkeypatch.setattr(node, name, value)
    return Node(folder, [str(folder), mode], patience)


def test_stop_is_told_until_it_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first signals come before the rank listens; torchrun, which ignores SIGTERM here, ends by itself when its rank has left."""
    one = start(tmp_path, monkeypatch, "train")
    monkeypatch.setattr(node, "LONELY", 60.0)  # a busy machine may take a while to start the stand-in
    one.ask(signal.SIGTERM)
    status = one.run()
    assert status == 0 and json.loads((tmp_path / "heartbeat.json").read_text())["number"] == signal.SIGUSR1
    assert one.verdict(status) == (UNFINISHED, "stopped (SIGTERM) and not finished; the same command goes on")


def test_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = start(tmp_path, monkeypatch, "train", seconds=0.1)
    assert one.verdict(one.run())[0] == 0


def test_stop_ends_the_wait_for_other_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a shell started us in the background, with SIGINT ignored. (Not ended, the stand-in's wait is over after 60 s.)"""
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        one = start(tmp_path, monkeypatch, "lonely", patience=60)
        one.ask(signal.SIGUSR1)
        began = time.monotonic()
        assert one.verdict(one.run())[0] == UNFINISHED and time.monotonic() - began < 30
    finally:
        signal.signal(signal.SIGINT, heard)


def test_meeting_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchrun that fails before it has ranks is started again, as long as patience lasts; one that had ranks is not."""
    one = start(tmp_path, monkeypatch, "late", seconds=0.1, patience=60)
    assert one.run() == 0 and (tmp_path / "attempts").read_text() == "xxx"
    (tmp_path / "attempts").unlink()
    assert start(tmp_path, monkeypatch, "late").run() == 1 and (tmp_path / "attempts").read_text() == "x"


def test_only_an_elastic_world_lets_nodes_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PET_NNODES", raising=False)
    rank = ["-m", "bd3_scale.train", "recipe.yaml"]
    assert node._elastic(["--nnodes", "4:8", *rank]) and node._elastic(["--nnodes=4:8", *rank])
    assert not node._elastic(["--nnodes", "8", *rank]) and not node._elastic(["--standalone", *rank])
    monkeypatch.setenv("PET_NNODES", "4:8")
    assert node._elastic(rank) and not node._elastic(["--nnodes", "8", *rank])


def write(folder: Path, doing: str, checkpoint: str) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "heartbeat.json").write_text(json.dumps({"doing": doing, "time": time.time()}))
    (folder / "checkpoints" / "latest").write_text(checkpoint)


@pytest.mark.parametrize(
    ("status", "doing", "checkpoint", "asked", "expected"),
    [
        (0, "finished", "b", "", 0),
        (0, "stopped", "b", "", UNFINISHED),  # another node was asked
        (0, None, "a", "", UNFINISHED),  # left before the first step; the heartbeat is that of the last attempt
        (1, "train", "b", "", UNFINISHED),  # it got further: worth another attempt
        (1, "train", "a", "", 1),  # it did not
        (137, "train", "a", "", 137),
        (1, "stopped", "b", "SIGTERM", UNFINISHED),
        (1, "finished", "b", "SIGTERM", 0),  # the signal came too late
        (1, "finished", "a", "", 1),  # what comes after the training fails every time
    ],
)
def test_verdict(
    status: int, doing: str | None, checkpoint: str, asked: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`doing`: what this attempt wrote; None: nothing. The last attempt finished a shorter budget at checkpoint a."""
    write(tmp_path, "finished", "a")
    one = Node(tmp_path, [])
    if doing is not None:
        write(tmp_path, doing, checkpoint)
    one.asked = asked
    found, why = one.verdict(status, settle=0.6)
    assert found == expected and why


def test_command_line(tmp_path: Path) -> None:
    """The real torchrun, a rank that ends at once, and a relative run directory."""
    (tmp_path / "run").mkdir()
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import json, os\nassert os.environ['WORLD_SIZE'] == '1'\njson.dump({'doing': 'finished'}, open('run/heartbeat.json', 'w'))\n"
    )
    command = [sys.executable, "-m", "bd3_scale.launching.node", "--directory", str(tmp_path), "--run-dir", "run", "--started", "began"]
    command += ["--", "--standalone", "--nproc-per-node", "1", str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0 and ": finished" in done.stderr, done.stderr
    assert (tmp_path / "began").exists()
