"""Data and checkpoints on a real S3 protocol server: moto's, on loopback (`pip install -e '.[s3]'`; skipped without it)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bd3_scale.prepare import main as prepare

boto3 = pytest.importorskip("boto3", reason="boto3 is not installed; pip install -e '.[s3]'")
pytest.importorskip("s3fs", reason="s3fs is not installed; pip install -e '.[s3]'")
server = pytest.importorskip("moto.server", reason="moto[server] is not installed; pip install -e '.[s3]'")
ACCESS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "known-to-nobody", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The endpoint of a server with two empty buckets, corpus and runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    for name, value in {**ACCESS, "AWS_ENDPOINT_URL": endpoint, "S3_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    running = server.ThreadedMotoServer(port=port, verbose=False)
    running.start()
    for bucket in ("corpus", "runs"):
        boto3.client("s3").create_bucket(Bucket=bucket)
    yield endpoint
    running.stop()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    texts = tmp_path / "corpus.jsonl"
    texts.write_text("".join(json.dumps({"text": f"The list number {number} is sorted. " * 3}) + "\n" for number in range(400)))
    folder = tmp_path / "data"
    options = ["--context", "32", "--tokenizer", "bytes", "--validation", "last:40", "--shard-bytes", "6000", "--json"]
    assert prepare(["--path", str(folder), "--source", str(texts), *options]) == 0
    return folder


def train(folder: Path, steps: int, *overrides: str) -> str:
    """What a run of so many steps prints to stderr."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "model: {context: 32, layers: 2, hidden: 32, heads: 2}\nobjective: {block_size: 4}\n"
        "data: {tokenizer: bytes, window: 2}\ntraining: {global_batch: 8, warmup: 2}\nvalidation: {every: 0, rows: 4}\n"
        "checkpoint: {every: 3}\ntracking: {every: 1, plots: false}\nrun: {device: cpu}\n"
    )
    command = [sys.executable, "-m", "bd3_scale.train", str(recipe), f"training.steps={steps}", *overrides]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def upload(folder: Path) -> None:
    for file in (path for path in folder.rglob("*") if path.is_file()):
        boto3.client("s3").upload_file(str(file), "corpus", f"data/{file.relative_to(folder)}")


def test_a_run_from_s3_to_s3_is_the_local_run_also_on_a_new_machine(store: str, data: Path, tmp_path: Path) -> None:
    """Rows are streamed through a small cache, checkpoints are copied, and the local disk is lost in the middle."""
    train(tmp_path, 12, f"data.path={data}", "run.dir=local")
    upload(data)
    remote = [
        "data.path=cache",
        "data.remote=s3://corpus/data",
        "data.window=2",
        "data.download_ahead=1",
        "checkpoint.remote=s3://runs/one",
    ]
    said = train(tmp_path, 6, *remote, "run.dir=remote")
    assert "known-to-nobody" not in said and "warning:" not in said
    shutil.rmtree(tmp_path / "remote")
    shutil.rmtree(tmp_path / "cache")
    train(tmp_path, 12, *remote, "run.dir=remote")
    whole, continued = losses(tmp_path / "local"), losses(tmp_path / "remote")
    assert list(continued) == [7, 8, 9, 10, 11, 12] and continued == {step: whole[step] for step in continued}


def test_a_bucket_that_is_missing_is_said_and_never_made(store: str, data: Path, tmp_path: Path) -> None:
    said = train(tmp_path, 3, f"data.path={data}", "run.dir=run", "checkpoint.remote=s3://wrong/run")
    assert "could not be uploaded to s3://wrong/run" in said and "does not exist" in said
    assert {bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]} == {"corpus", "runs"}
