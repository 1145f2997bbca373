"""Nodes that wait for each other: our launcher says who has come; torchrun's command as it stands works where PET_* tell the rest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, give_turn, take_turn
from tests.distributed.test_waiting import port  # noqa: F401 - a fixture

NODE = """
import sys
from bd3_scale.launching import node
node.QUIET = 0.1
node.SPEAKER = [sys.executable, "-c", "import sys\\nfrom bd3_scale.distributed import waiting\\nwaiting.FIRST = 1.0\\n"
                "from bd3_scale.launching import meeting\\nmeeting.main(sys.argv[1:])"]
sys.exit(node.main())
"""
RANK = """
import os
from pathlib import Path
Path(__file__).with_name("heartbeat.json").write_text('{"doing": "finished"}')  # what the launcher reads in the end
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
"""


@pytest.fixture
def rank(tmp_path: Path) -> Path:
    take_turn(2)  # of more, which mostly wait
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return path


def start(command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=environment, start_new_session=True)


def finish(nodes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    """All end well, and were one world."""
    try:
        assert [node.wait(120) for node in nodes] == [0, 0], [log.read_text()[-2000:] for log in logs]
    finally:
        for node in nodes:
            node.kill()
        give_turn()
    said = "".join(log.read_text() for log in logs)
    assert sorted(re.findall(r"^rank \d of 2$", said, re.M)) == ["rank 0 of 2", "rank 1 of 2"]


def test_launcher_says_who_has_come(rank: Path, port: int, tmp_path: Path) -> None:  # noqa: F811
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    command = [sys.executable, "-c", NODE, "--run-dir", str(tmp_path), "--", *meeting, str(rank)]
    logs = [tmp_path / f"node-{number}.log" for number in range(2)]
    nodes, end = [start(command, logs[0])], time.monotonic() + 90
    while not re.search(rf"torchrun has no rank yet; 1 of 2 nodes have come to 127\.0\.0\.1:{port} \(\S+\); start", logs[0].read_text()):
        assert time.monotonic() < end and nodes[0].poll() is None, logs[0].read_text()[-2000:]
        time.sleep(0.1)
    nodes.append(start(command, logs[1]))
    finish(nodes, logs)


def test_variables_stand_for_the_missing_options(rank: Path, port: int, tmp_path: Path) -> None:  # noqa: F811
    """`torchrun --nnodes 2 --nproc-per-node 1 ...` and nothing else, on both nodes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", str(rank)]
    logs = [tmp_path / f"node-{number}.log" for number in range(2)]
    finish([start(command, log, PET_RDZV_BACKEND="c10d", PET_RDZV_ENDPOINT=f"127.0.0.1:{port}") for log in logs], logs)
