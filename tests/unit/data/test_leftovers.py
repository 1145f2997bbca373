"""No file is left by a clean end, nor by kill -9 and one more start; jobs that start at once on a folder do not disturb each other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bd3_scale.data.manifest import Manifest
from bd3_scale.data.preparation.packing import Document
from bd3_scale.data.preparation.prepare import Packing, prepare
from bd3_scale.data.tokenizer import ByteTokenizer
from tests.unit.data.conftest import random_documents

ROOT = Path(__file__).resolve().parents[3]
STARTS = 20
Job = subprocess.Popen[str]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary directory of the jobs."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def jobs(temporary: Path) -> Iterator[list[Job]]:
    """Two processes of `starting.py`, for all tests of this file: to start one costs more than what it does."""
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("starting.py"))]
    running = [subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert [hear(job) for job in running] == ["ready", "ready"]
        yield running
    finally:
        for job in running:
            job.kill()
            job.wait()


def say(process: Job, **keys: object) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(keys) + "\n")
    process.stdin.flush()


def hear(process: Job) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def shared_memory() -> set[str]:
    """What mosaicml-streaming would leave: 000000_locals and the like."""
    return {name for name in os.listdir("/dev/shm") if re.match(r"\d{6}_", name)}


def left_in(temporary: Path) -> set[str]:
    """What is in the temporary directory beside the cache that torch keeps there for all processes."""
    return {name for name in files(temporary) if not name.startswith("torchinductor_")}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("remote") / "mds"

    def documents() -> Iterator[Document]:
        return random_documents(1000)

    return folder, prepare(folder, Packing(ByteTokenizer(), 64, "bos", "mds", shard_bytes=9_000), "random", None, documents)


@pytest.mark.parametrize("way", ["prepared", "fetched", "fetched into a small cache"])
def test_two_jobs_at_once_twenty_times(way: str, jobs: list[Job], remote: tuple[Path, Manifest], temporary: Path, tmp_path: Path) -> None:
    """Both find a folder that does not exist yet, and each reads every row of the run."""
    before = shared_memory()
    shards = sorted(shard.bytes for shard in remote[1].train.shards)
    room = sum(path.stat().st_size for path in remote[0].rglob("*.json")) * 2 + 12 * shards[-1]
    assert way != "fetched into a small cache" or room < sum(shards)
    answers = set()
    for trial in range(STARTS):
        folder = tmp_path / "data" / str(trial)
        keys: dict[str, object] = {"path": str(folder)}
        if way != "prepared":
            keys["remote"] = str(remote[0])
        if way == "fetched into a small cache":
            keys["cache_bytes"] = room
        for job in jobs:
            say(job, **keys)
        answers |= {hear(job) for job in jobs}
        assert len(answers) == 1 and len(next(iter(answers))) == 64, answers
        assert not [name for name in files(tmp_path / "data") if Path(name).name.startswith(".")], "a lock or a scratch folder"
        assert way != "fetched" or files(folder) == files(remote[0])
    assert left_in(temporary) == set() and shared_memory() <= before


def test_nothing_is_left_by_an_end_nor_by_a_kill_and_a_start(
    jobs: list[Job], remote: tuple[Path, Manifest], temporary: Path, tmp_path: Path
) -> None:
    """The last test of the jobs: one is killed, the other ends."""
    folder, before, (killed, clean) = tmp_path / "cache", shared_memory(), jobs
    here = {"path": str(folder), "remote": str(remote[0])}
    say(killed, **here, slow=True)
    while "hanging" not in (said := hear(killed)):
        assert said, "it ended"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert {".fetch", ".fetch.lock"} <= files(folder), "it was killed in a download"
    say(clean, **here)
    assert len(hear(clean)) == 64
    assert clean.stdin is not None
    clean.stdin.close()
    assert clean.wait(60) == 0
    assert files(folder) == files(remote[0]), "the whole data set, and nothing else"
    assert left_in(temporary) == set() and shared_memory() <= before
