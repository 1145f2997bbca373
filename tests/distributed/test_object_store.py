"""Data and checkpoints on a real S3 protocol server: moto's, on loopback (`pip install -e '.[s3]'`; skipped without it).

A store that answers wrongly (faulty_store.py) meets six readers here; `BD3_ALL_FAULTS=1` has a hundred of them, and the quickstart on two
processes, killed twice (benchmarks/2026-11-27-object-store.md)."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest

from bd3_scale.data import cache
from bd3_scale.data.formats.row_reader import ShardReader
from bd3_scale.data.tokenizer import ByteTokenizer
from bd3_scale.errors import CheckpointError, DataError
from bd3_scale.prepare import main as prepare
from bd3_scale.saving import fetch
from tests.distributed.conftest import metrics
from tests.distributed.faulty_store import ALWAYS, KINDS, Fault, FaultyStore
from tests.distributed.launch import ROOT

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
    written = run / "metrics.jsonl"
    lines = [json.loads(line) for line in written.read_text().splitlines(True) if line.endswith("\n")] if written.exists() else []
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def upload(folder: Path, bucket: str = "corpus", under: str = "data") -> None:
    for file in (path for path in folder.rglob("*") if path.is_file()):
        boto3.client("s3").upload_file(str(file), bucket, f"{under}/{file.relative_to(folder)}")


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


def test_wrong_credentials_and_a_missing_bucket_are_one_line(
    store: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.core import responses

    upload(data)

    def said(read: Callable[[], object]) -> str:
        with pytest.raises((DataError, CheckpointError)) as failed:
            read()
        text = str(failed.value)
        assert "\n" not in text and ACCESS["AWS_SECRET_ACCESS_KEY"] not in text
        return text

    assert "s3://wrong/data" in said(cache.Cache(tmp_path / "one", "s3://wrong/data").manifest)
    monkeypatch.setattr(responses.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)  # from here on keys are looked at
    monkeypatch.setattr(responses.ActionAuthenticatorMixin, "request_count", 0)
    text = said(cache.Cache(tmp_path / "two", "s3://corpus/data").manifest)
    assert "s3://corpus/data" in text and "permission" in text
    text = said(lambda: fetch.fetch_latest("s3://runs/one", tmp_path / "run"))
    assert "s3://runs/one" in text and "PermissionError" in text


ALL = bool(os.environ.get("BD3_ALL_FAULTS"))
CHECKPOINT = ROOT / "tests" / "golden" / "checkpoints" / "format_2"


@pytest.fixture
def faulty(store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """Between the readers of this process and the server. What waits long, waits shortly."""
    between = FaultyStore(store)
    monkeypatch.setattr(cache, "TIMEOUT", 1.0)
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    patience = {"read_timeout": 1, "retries": {"max_attempts": 1}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": patience, "endpoint_url": between.endpoint})
    yield between
    between.shutdown()
    between.server_close()


def test_of_every_fault_of_a_store_there_is_the_right_content_or_an_error(
    faulty: FaultyStore, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Rows of a prepared folder, read through a new cache, and a checkpoint, fetched to a new machine, are theirs to the bit, or the one
    line of error names what cannot be had and where."""
    upload(data)
    (tmp_path / "one").mkdir()
    shutil.copytree(CHECKPOINT, tmp_path / "one", dirs_exist_ok=True)
    (tmp_path / "one" / "latest").write_text("step_00000003\n")
    upload(tmp_path / "one", "runs", "one")
    for name in ("AWS_ENDPOINT_URL", "S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, faulty.endpoint)
    with ShardReader(data, "train", context=32, tokenizer=ByteTokenizer()) as reader:
        right = reader.rows(range(len(reader)))
    checkpoint = {path.name: path.read_bytes() for path in (tmp_path / "one" / "step_00000003").iterdir() if path.name != "recipe.yaml"}
    shards = [path.name for path in sorted((data / "train").glob("*.mds"))]

    def rows(number: int) -> bool:
        copy = cache.Cache(tmp_path / f"cache{number}", "s3://corpus/data")
        manifest = copy.manifest()
        with ShardReader(copy.folder, "train", context=32, tokenizer=ByteTokenizer(), cache=copy, manifest=manifest) as reader:
            order = np.random.default_rng(number).permutation(len(reader))
            return bool((reader.rows(order) == right[order]).all())

    def state(number: int) -> bool:
        found = fetch.fetch_latest("s3://runs/one", tmp_path / f"run{number}")
        return found is not None and all((found / name).read_bytes() == content for name, content in checkpoint.items())

    draw, outcomes, silent = random.Random(0), Counter[str](), []
    for number in range(100 if ALL else len(KINDS)):
        kind, of_data = KINDS[number % len(KINDS)], number % 5 < 3
        suffix = draw.choice(["/manifest.json", "/train/index.json", *shards]) if of_data else draw.choice([*checkpoint, "/latest"])
        times = draw.choice([1, 2, ALWAYS]) if ALL else (ALWAYS if kind in ("short", "replaced") else 1)
        faulty.fault = Fault(kind, suffix, times)
        began = time.monotonic()
        try:
            outcome = "right" if (rows if of_data else state)(number) else "WRONG"
        except (DataError, CheckpointError) as error:
            text = str(error)
            outcome = "error" if "s3://" in text and "\n" not in text else f"UNCLEAR {text}"
        if outcome not in ("right", "error") or not faulty.fault.met:
            silent.append((kind, suffix, times, faulty.fault.met, outcome))
        outcomes[f"{'data' if of_data else 'checkpoint'} {kind} {'always' if times == ALWAYS else 'once or twice'}: {outcome[:7]}"] += 1
        print(f"{number}: {kind} {suffix} x{times} met {faulty.fault.met}: {outcome} {time.monotonic() - began:.1f} s")
    for line, count in sorted(outcomes.items()):
        record_property("table", f"{line} {count}")
    assert not silent


@pytest.mark.skipif(not ALL, reason="half an hour; BD3_ALL_FAULTS=1")
@pytest.mark.timeout(5400)
def test_the_quickstart_from_s3_on_two_processes_killed_twice_is_the_local_run(
    store: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """All of the recipe as it is, with every loss written down. After the first kill the local disk is lost, too."""
    recipe, command = str(ROOT / "recipes" / "quickstart.yaml"), [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}

    def train(run: str, *more: str, kill_at: int | None = None) -> dict[int, float]:
        """The losses that stand in the run's folder at the end, or after SIGKILL to both ranks once that step is among them."""
        began, log = time.monotonic(), tmp_path / f"{run}.log"
        arguments = ["--nproc-per-node", "2", "-m", "bd3_scale.train", recipe, "run.device=cpu", "tracking.every=1", f"run.dir={run}"]
        with log.open("ab") as said:
            torchrun = subprocess.Popen([*command, *arguments, *more], cwd=tmp_path, env=environment, stdout=said, stderr=said)
        try:
            while torchrun.poll() is None and (kill_at is None or max(losses(tmp_path / run), default=0) < kill_at):
                time.sleep(0.5)
            ranks = psutil.Process(torchrun.pid).children() if torchrun.poll() is None else []
            for rank in ranks:
                rank.kill()
            assert (torchrun.wait(timeout=60) != 0) is (len(ranks) == 2) is (kill_at is not None), log.read_text()[-3000:]
        finally:
            for rank in psutil.Process(torchrun.pid).children() if torchrun.poll() is None else []:
                rank.kill()
            torchrun.kill()
        found = losses(tmp_path / run)
        record_property("table", f"{run}: steps {min(found)} to {max(found)}, {time.monotonic() - began:.0f} s")
        return found

    options = ["--context", "128", "--tokenizer", "gpt2", "--tokens", "2500000", "--shard-bytes", "50000", "--json"]
    assert prepare(["--source", "documentation", "--path", str(tmp_path / "documentation"), *options]) == 0
    whole = train("local", "data.path=documentation")
    upload(tmp_path / "documentation")
    remote = ["data.path=cache", "data.remote=s3://corpus/data", "data.cache_bytes=2000000", "checkpoint.remote=s3://runs/quickstart"]
    first = train("remote", *remote, kill_at=450)
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "remote")
    second = train("remote", *remote, kill_at=750)
    last = train("remote", *remote)
    assert list(whole) == list(range(1, 901)) and min(second) == min(last) == 301, "the second goes on from the store's checkpoint"
    assert first.keys() | last.keys() == whole.keys()
    assert all(found == {step: whole[step] for step in found} for found in (first, second, last))
    validated, again = (
        {line["step"]: line["nelbo"] for line in metrics(tmp_path / run) if line["kind"] == "validation"} for run in ("local", "remote")
    )
    assert list(again) == [600, 900] and validated.items() >= again.items()
