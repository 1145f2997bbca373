"""A node that was started with something else than the others does not train with them."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from bd3_scale.data.manifest import Manifest
from tests.distributed.conftest import metrics
from tests.distributed.forked import run_ranks

COMMON = ["training.steps=2", "validation.every=0", "checkpoint.every=0", "validation.rows=2", "parallel.heartbeat=120"]
DIFFERENT = {
    "learning rate": (["training.learning_rate=0.03"], "training.learning_rate is 0.03 on RANK1 but 0.003 on RANK0; start all nodes"),
    "seed": (["run.seed=8"], "run.seed is 8 on RANK1 but 7 on RANK0"),
    "clip": (["training.clip=5"], "training.clip is 5.0 on RANK1 but 0.5 on RANK0"),
    "ema": (["training.ema=0.5"], "training.ema is 0.5 on RANK1 but 0.9 on RANK0"),
    "layout": (["parallel.tensor=2"], "parallel.tensor is 2 on RANK1 but 1 on RANK0"),
    "remote": (["checkpoint.remote=s3://me:secret@bucket/x"], "checkpoint.remote is s3://***@bucket/x on RANK1 but null on RANK0"),
    "version": (["version=2.0"], "version of torch is 2.0 on RANK1 but"),
    "corpus": (["data.path=OTHER"], "let it name the same data on all nodes"),
    "what may differ": (["data.path=COPY", "data.prefetch=0", "run.threads=1"], ""),
}


@pytest.fixture(scope="module")
def said(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("agreement")
    places = {"COPY": folder / "copy", "OTHER": folder / "other"}
    for place in places.values():
        shutil.copytree(tiny_data, place)
    manifest = places["OTHER"] / "manifest.json"
    manifest.write_bytes(replace(Manifest.load(manifest), source="another").to_bytes())
    plan = folder / "plan.json"
    items = []
    for name, (other, _) in DIFFERENT.items():
        for word, place in places.items():
            other = [item.replace(word, str(place)) for item in other]
        items.append((name, str(recipe), [f"run.dir={folder / name}", *COMMON], other))
    plan.write_text(json.dumps(items))
    out = folder / "out.json"
    finished = run_ranks(2, ["tests/distributed/agreement_worker.py", str(plan), str(out)], folder / "log", timeout=200)
    assert finished.status == 0, finished.output[-6000:]
    return folder, json.loads(out.read_text())


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_rank_that_differs_is_named_before_the_first_step(said: tuple[Path, dict[str, list[str]]], name: str) -> None:
    folder, texts = said
    expected = DIFFERENT[name][1]
    for rank in (0, 1):
        expected = expected.replace(f"RANK{rank}", f"rank {rank} (host {socket.gethostname()})")
    first, second = texts[name]
    assert first == second and "\n" not in first
    if not expected:
        assert first == "" and len(metrics(folder / name)) > 0
    else:
        assert expected in first and "secret" not in first
        assert not (folder / name).exists(), "nothing was begun"
