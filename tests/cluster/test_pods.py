"""What the pods of a rendered Job run, as processes of this machine: the container's own command, arguments, environment and probe.

The names that only a cluster resolves are replaced: the Service's by the loopback, the ConfigMap's mount by the recipe's file.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from bd3_scale import launch
from bd3_scale.launching.node import UNFINISHED
from tests.distributed.conftest import metrics
from tests.distributed.launch import ALL, ROOT, give_turn, take_turn

COMMON = ["training.steps=200", "checkpoint.every=25", "validation.every=100", "parallel.micro_batch=1", "parallel.heartbeat=10"]


class Pods:
    """Two pods of the job; `start` is what the Job's controller does."""

    def __init__(self, document: dict[str, Any], recipe: Path, port: int, folder: Path) -> None:
        self.spec = document["spec"]["template"]["spec"]["containers"][0]
        self.folder, self.recipe, self.port = folder, recipe, port
        self.running: list[subprocess.Popen[bytes]] = []

    def _word(self, word: str) -> str:
        here = {"/etc/bd3_scale/recipe.yaml": str(self.recipe), f"tiny-0.tiny:{self.port}": f"127.0.0.1:{self.port}"}
        return here.get(word, word.replace("/tmp/bd3_scale.started", str(self.folder / "started"))).replace("$$(", "$(")

    def start(self) -> None:
        program, *command = [self._word(word) for word in [*self.spec["command"], *self.spec["args"]]]
        assert program == "python"
        values = {one["name"]: one["value"].replace("$$(", "$(") for one in self.spec["env"]}
        environment = {**os.environ, **values, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        for number in range(2):
            with open(self.folder / f"pod-{number}.log", "a") as log:
                self.running.append(
                    subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment, start_new_session=True)
                )

    def wait(self, seconds: float = 300) -> list[int]:
        """The statuses of all pods, when all have ended."""
        statuses = [pod.wait(seconds) for pod in self.running]
        self.running.clear()
        return statuses

    def alive(self) -> bool:
        """The liveness probe."""
        command = self.spec["livenessProbe"]["exec"]["command"]
        return subprocess.run([self._word(word) for word in command], check=False).returncode == 0

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("pod-*.log")))


@pytest.fixture
def pods(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Pods]:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    words = [
        "kubernetes",
        str(recipe),
        "run.dir=run",
        *COMMON,
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--cpus-per-node",
        "1",
        "--image",
        "i",
    ]
    words += ["--claim", "c", "--mount", str(tmp_path), "--port", str(port), "--name", "tiny", "--restarts", "1", "--wait", "60"]
    assert launch.main([*words, "--env", "OMP_NUM_THREADS=1", "--dry-run"]) == 0
    job = next(one for one in yaml.safe_load_all(capsys.readouterr().out) if one["kind"] == "Job")
    take_turn(2)  # of more, which mostly wait
    found = Pods(job, recipe, port, tmp_path)
    yield found
    for pod in found.running:
        os.killpg(pod.pid, signal.SIGKILL)
        pod.wait()
    give_turn()


def until_step(pods: Pods, run: Path, step: int) -> None:
    file, end = run / "metrics.jsonl", time.monotonic() + 200
    while not file.exists() or file.read_text().count('"train"') < step:
        assert time.monotonic() < end and all(pod.poll() is None for pod in pods.running), pods.said()
        time.sleep(0.1)


def test_evicted_pod_stops_the_run_and_new_pods_go_on(pods: Pods, recipe: Path, tmp_path: Path) -> None:
    """SIGTERM to one pod alone, as an eviction sends it: all save and end as pods that are to be made anew; these finish the run."""
    run = tmp_path / "run"
    pods.start()
    until_step(pods, run, 30)
    assert pods.alive()
    pods.running[1].send_signal(signal.SIGTERM)
    assert pods.wait() == [UNFINISHED, UNFINISHED], pods.said()
    heartbeat = json.loads((run / "heartbeat.json").read_text())
    assert heartbeat["doing"] == "stopped" and (run / "checkpoints" / "latest").read_text().strip() == f"step_{heartbeat['step']:08d}"
    for name in ("started", "run/heartbeat.json"):  # silent for longer than the probe's patience
        os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    assert not pods.alive()
    pods.start()
    assert pods.wait() == [0, 0], pods.said()
    assert pods.alive() and json.loads((run / "heartbeat.json").read_text())["doing"] == "finished"
    steps = [line["step"] for line in metrics(run) if line["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 200
    assert np.isfinite([line["loss"] for line in metrics(run) if line["kind"] == "train"]).all()


@pytest.mark.skipif(not ALL, reason="a minute; BD3_ALL_LAYOUTS=1")
def test_lost_pod_costs_the_steps_since_the_last_checkpoint(pods: Pods, tmp_path: Path) -> None:
    """A pod is gone without a word; the other one, left alone, ends as one that is to be made anew, because the run got further."""
    run = tmp_path / "run"
    pods.start()
    until_step(pods, run, 40)
    lost = pods.running.pop()
    for one in [psutil.Process(lost.pid), *psutil.Process(lost.pid).children(recursive=True)]:
        one.kill()
    lost.wait()
    assert pods.wait() == [UNFINISHED], pods.said()
    assert "is gone" in pods.said() or "has not answered" in pods.said() or "does not answer" in pods.said()
    pods.start()
    assert pods.wait() == [0, 0], pods.said()
