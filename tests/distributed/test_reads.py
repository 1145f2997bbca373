"""No step waits for the device: between two logging steps the host reads nothing of it, whatever the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bd3_scale.engines import zero_engine
from tests.distributed.forked import run_ranks

BF16, TENSOR, PIPELINE, ACCUMULATED = "training.precision=bf16", "parallel.tensor=2", "parallel.pipeline=2", "parallel.micro_batch=1"


def engine(name: str, zero: int, *more: str) -> list[str]:
    return [f"parallel.engine={name}", f"parallel.zero={zero}", *more]


TRAININGS: dict[str, tuple[int, list[str]]] = {
    "megatron, zero 1, one process": (1, engine("megatron", 1)),
    "deepspeed, zero 3, bf16, one process": (1, engine("deepspeed", 3, BF16)),
    "megatron, zero 0": (2, engine("megatron", 0)),
    "megatron, zero 1, accumulated": (2, engine("megatron", 1, ACCUMULATED)),
    "megatron, zero 1, bf16": (2, engine("megatron", 1, BF16)),
    "megatron, zero 1, tensor 2, sequence, spikes": (
        2, engine("megatron", 1, TENSOR, "parallel.sequence=true", "training.spike_deviations=3")
    ),
    "megatron, zero 1, pipeline 2": (2, engine("megatron", 1, PIPELINE)),
    "deepspeed, zero 0": (2, engine("deepspeed", 0)),
    "deepspeed, zero 1, accumulated": (2, engine("deepspeed", 1, ACCUMULATED)),
    "deepspeed, zero 1, bf16": (2, engine("deepspeed", 1, BF16)),
    "deepspeed, zero 1, tensor 2": (2, engine("deepspeed", 1, TENSOR)),
    "deepspeed, zero 2, spikes": (2, engine("deepspeed", 2, "training.spike_deviations=3")),
    "deepspeed, zero 2, bf16, accumulated": (2, engine("deepspeed", 2, BF16, ACCUMULATED)),
    "deepspeed, zero 2, no clipping": (2, engine("deepspeed", 2, "training.clip=0")),
    "deepspeed, zero 3": (2, engine("deepspeed", 3)),
    "deepspeed, zero 3, bf16, accumulated": (2, engine("deepspeed", 3, BF16, ACCUMULATED)),
    "deepspeed, zero 3, tensor 2": (2, engine("deepspeed", 3, TENSOR)),
    "ssdlm": (2, engine("auto", 1, "objective.kind=ssdlm", "objective.block_size=16", "model.conditioning=adaln")),
    "sedd": (2, engine("auto", 2, "objective.kind=sedd", "objective.block_size=null", "model.conditioning=adaln")),
}  # fmt: skip


@pytest.fixture(scope="module")
def counted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[dict[str, int], int]]]:
    folder = tmp_path_factory.mktemp("reads")
    common = ["training.steps=4", "tracking.every=4", "validation.every=0", "checkpoint.every=0"]
    results: dict[str, list[tuple[dict[str, int], int]]] = {}
    for world_size in (1, 2):
        plan, out = folder / f"plan-{world_size}.json", folder / f"out-{world_size}.json"
        items = [
            (name, str(recipe), [f"run.dir={folder / str(number)}", *common, *overrides])
            for number, (name, (size, overrides)) in enumerate(TRAININGS.items())
            if size == world_size
        ]
        plan.write_text(json.dumps(items))
        finished = run_ranks(world_size, ["tests/distributed/reads_worker.py", str(plan), str(out)], plan.with_suffix(".log"), timeout=300)
        assert finished.status == 0, finished.output[-6000:]
        results |= json.loads(out.read_text())
    return results


@pytest.mark.parametrize("name", TRAININGS)
def test_no_step_reads_the_device(counted: dict[str, list], name: str, record_property: Callable[[str, object], None]) -> None:
    record_property(
        "table", f"reads of the device in {counted[name][0][1]} steps, {name:48s} {[sum(found.values()) for found, _ in counted[name]]}"
    )
    for found, steps in counted[name]:
        assert steps == 3 and found == {}, found


def test_deepspeed_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    assert deepspeed.__version__.split("+")[0] == zero_engine.VERSION, "look at what zero_engine.py binds before its version is raised"
    monkeypatch.setattr(deepspeed, "__version__", "0.20.0")
    with pytest.raises(RuntimeError, match=r"DeepSpeed 0\.20\.0 is installed, but"):
        zero_engine.patch_norms()
