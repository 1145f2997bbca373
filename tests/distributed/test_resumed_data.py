"""A run of two epochs that is stopped at random steps and continued on 1, 2, 3 and 4 ranks trains on the rows of one that is not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.forked import run_ranks
from tests.distributed.launch import ALL

GLOBAL_BATCH, STEPS = 12, 24
_LAYOUTS_OF_FOUR = [(1, 1), (2, 1), (1, 2), (2, 2)] if ALL else [(1, 1), (2, 2)]
LAUNCHES: list[tuple[int, list[tuple[int, int]]]] = [  # ranks; (tensor, pipeline) of each part of the run
    (4, _LAYOUTS_OF_FOUR),
    (1, [(1, 1)]),
    (3, [(1, 1), (1, 1)] if ALL else [(1, 1)]),
    (2, [(2, 1), (1, 2), (1, 1)] if ALL else [(1, 2)]),
]
FORMATS = ("mds", "webdataset")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format -> a folder whose training rows are 12 global batches, in several shards; no two rows alike."""
    from bd3_scale.data.preparation.packing import Document
    from bd3_scale.data.preparation.prepare import Packing, prepare
    from bd3_scale.data.tokenizer import load_tokenizer

    random = np.random.Generator(np.random.Philox(3))
    rows = GLOBAL_BATCH * STEPS // 2
    documents = [
        Document("train", random.integers(0, 256, 31 * rows + 7), False),
        Document("held out", random.integers(0, 256, 31 * 12), True),
    ]
    made = {kind: tmp_path_factory.mktemp("corpus") / kind for kind in FORMATS}
    for kind, folder in made.items():
        manifest = prepare(folder, Packing(load_tokenizer("bytes"), 32, format=kind, shard_bytes=4300), "random", None, lambda: documents)
        assert manifest.train.rows == rows and len(manifest.train.shards) > 2
    return made


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob(f"{name}-*.jsonl")) for line in path.read_text().splitlines()]


def test_stopped_and_resumed_on_other_layouts(recipe: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    stops = sorted(
        np.random.default_rng(11).choice(np.arange(1, STEPS), sum(len(layouts) for _, layouts in LAUNCHES) - 1, replace=False).tolist()
    )
    ends = iter([*stops, STEPS])
    traces = tmp_path / "traces"
    traces.mkdir()

    def training(kind: str, run: str, steps: int, tensor: int = 1, pipeline: int = 1) -> list[object]:
        changes = [f"run.dir={tmp_path / run}-{kind}", f"data.path={corpora[kind]}", f"data.format={kind}", f"training.steps={steps}"]
        changes += [f"training.global_batch={GLOBAL_BATCH}", "validation.every=0", "validation.rows=4", "checkpoint.every=0"]
        # Ranks of one replica exchange much and often: fewer, larger micro-batches.
        micro_batch = 1 if tensor == pipeline == 1 else 3
        changes += [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.micro_batch={micro_batch}"]
        return [str(recipe), changes, f"{run}-{kind}"]

    for number, (ranks, layouts) in enumerate(LAUNCHES):
        plan = [training(kind, "whole", STEPS) for kind in FORMATS] if ranks == 1 else []
        for (tensor, pipeline), end in zip(layouts, ends, strict=False):
            plan += [training(kind, "stopped", end, tensor, pipeline) for kind in FORMATS]
        path = tmp_path / f"plan-{number}.json"
        path.write_text(json.dumps(plan))
        finished = run_ranks(ranks, ["tests/distributed/trace_worker.py", str(path), str(traces)], path.with_suffix(".log"), timeout=400)
        assert finished.status == 0, finished.output[-6000:]
    assert next(ends, None) is None, "every part was trained"

    orders = []
    for kind in FORMATS:
        whole = {line["samples"]: dict(zip(line["slots"], line["rows"], strict=True)) for line in lines(traces, f"whole-{kind}")}
        assert sorted(whole) == [step * GLOBAL_BATCH for step in range(STEPS)]
        orders.append([[batch[slot] for slot in range(GLOBAL_BATCH)] for _, batch in sorted(whole.items())])
        assert set(Counter(tuple(row) for batch in orders[-1] for row in batch).values()) == {2}, "every row twice in two epochs"
        seen: Counter[tuple[int, int]] = Counter()
        for line in lines(traces, f"stopped-{kind}"):
            tensor, pipeline, _ = line["layout"]
            for slot, row in zip(line["slots"], line["rows"], strict=True):
                assert row == whole[line["samples"]][slot], (kind, line["samples"], slot)
                seen[line["samples"] // GLOBAL_BATCH, slot] += 12 // (tensor * pipeline)
        assert seen == {(step, slot): 12 for step in range(STEPS) for slot in range(GLOBAL_BATCH)}, "once by each of a replica's peers"
    assert orders[0] == orders[1], "MDS and tar give the same batches"


def test_a_mixture_through_a_small_cache(recipe: Path, corpora: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    """On two ranks in one piece, and in two pieces with the sources elsewhere: the same rows, and the first source gives three of four."""
    traces = tmp_path / "traces"
    traces.mkdir()

    def training(run: str, steps: int, cache: str) -> list[object]:
        first = f"{{path: {tmp_path / cache}-1, weight: 0.75, remote: {tiny_data}}}"
        second = f"{{path: {tmp_path / cache}-2, weight: 0.25, remote: {corpora['webdataset']}, format: webdataset}}"
        data = ["data.path=~/.cache/bd3_scale/data", f"data.mixture=[{first}, {second}]", "data.cache_bytes=100_000", "data.window=1"]
        changes = [f"run.dir={tmp_path / run}", f"training.steps={steps}", "validation.every=0", "validation.rows=8", "checkpoint.every=0"]
        return [str(recipe), [*changes, *data], run]

    path = tmp_path / "plan.json"
    path.write_text(json.dumps([training("whole", 12, "a"), training("stopped", 5, "a"), training("stopped", 12, "b")]))
    finished = run_ranks(2, ["tests/distributed/trace_worker.py", str(path), str(traces)], path.with_suffix(".log"), timeout=400)
    assert finished.status == 0, finished.output[-6000:]
    whole, stopped = (
        {(line["samples"], slot): row for line in lines(traces, run) for slot, row in zip(line["slots"], line["rows"], strict=True)}
        for run in ("whole", "stopped")
    )
    assert whole == stopped and len(whole) == 12 * 8
    invented = [row for row in whole.values() if all(one < 128 or one == 256 for one in row)]  # the other is random bytes
    assert len(invented) == 72
    for cache in tmp_path.glob("[ab]-[12]"):
        assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) <= 100_000
        assert not list(cache.glob(".*"))
