"""State falls as it should: what every rank of every layout holds, state and activations, is what the plan says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.forked import run_ranks
from tests.distributed.launch import ALL

MODEL = ["model.layers=4", "model.hidden=128", "model.heads=4", "model.key_value_heads=2", "model.conditioning=adaln",
         "model.conditioning_size=32", "parallel.micro_batch=2"]  # fmt: skip
CONTEXT, RING = "parallel.context={}", "parallel.context_exchange=ring"
BF16, MUON = "training.precision=bf16", "training.optimizer=muon"
TIED, FSDP, DEEPSPEED = "model.tied_head=true", "parallel.engine=fsdp", "parallel.engine=deepspeed"


def layout(tensor: int, pipeline: int, zero: int, *more: str) -> list[str]:
    return [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.zero={zero}", *more]


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "zero 0": (1, layout(1, 1, 0)),
    "zero 1": (1, layout(1, 1, 1)),
    "zero 1, recomputed": (1, layout(1, 1, 1, "training.recompute=layer")),
    "zero 1, MLPs recomputed": (1, layout(1, 1, 1, "training.recompute=mlp")),
    "zero 1, deepspeed": (1, layout(1, 1, 1, DEEPSPEED)),
    "zero 1, muon": (1, layout(1, 1, 1, MUON)),
    "data 2, zero 1, bf16": (2, layout(1, 1, 1, BF16)),
    "data 2, zero 1, bf16, deepspeed": (2, layout(1, 1, 1, BF16, DEEPSPEED)),
    "data 2, zero 2": (2, layout(1, 1, 2)),
    "tensor 2, sequence": (2, layout(2, 1, 1, "parallel.sequence=true")),
    "pipeline 2, zero 0": (2, layout(1, 2, 0)),
    "pipeline 2 x 2": (2, layout(1, 2, 1, "parallel.virtual_stages=2")),
    "pipeline 2, bf16, tied": (2, layout(1, 2, 1, BF16, TIED)),
    "pipeline 2, zero 2": (2, layout(1, 2, 2)),
    "data 4, zero 0": (4, layout(1, 1, 0)),
    "data 4, zero 1": (4, layout(1, 1, 1)),
    "data 4, zero 1, deepspeed": (4, layout(1, 1, 1, DEEPSPEED)),
    "data 4, zero 2, bf16": (4, layout(1, 1, 2, BF16)),
    "data 4, zero 3": (4, layout(1, 1, 3)),
    "data 4, zero 3, bf16": (4, layout(1, 1, 3, BF16)),
    "tensor 4, shared key heads": (4, layout(4, 1, 1)),
    "tensor 2, data 2, zero 3": (4, layout(2, 1, 3)),
    "pipeline 4": (4, layout(1, 4, 1)),
    "tensor 2, pipeline 2": (4, layout(2, 2, 1)),
    "pipeline 2, data 2, bf16": (4, layout(1, 2, 1, BF16)),
    "pipeline 2, data 2, zero 3": (4, layout(1, 2, 3)),
    "pipeline 2, data 2, zero 3, bf16, tied": (4, layout(1, 2, 3, BF16, TIED)),
    "data 4, fsdp, shard 2, zero 3": (4, layout(1, 1, 3, FSDP, "parallel.shard=2")),
    "context 2": (2, layout(1, 1, 1, CONTEXT.format(2))),
    "context 4, ring": (4, layout(1, 1, 1, CONTEXT.format(4), RING)),
    "context 4, recomputed": (4, layout(1, 1, 1, CONTEXT.format(4), "training.recompute=layer")),
    "context 2, data 2, fsdp, zero 3": (4, layout(1, 1, 3, CONTEXT.format(2), FSDP)),
    "data 4, fsdp, zero 2, bf16": (4, layout(1, 1, 2, FSDP, BF16)),
}

SAID_BY_OTHERS = {
    "data 2, zero 1, bf16, deepspeed", "pipeline 2, bf16, tied", "data 4, zero 1, deepspeed", "data 4, zero 3", "tensor 2, data 2, zero 3",
    "pipeline 4", "pipeline 2, data 2, bf16", "pipeline 2, data 2, zero 3", "data 4, fsdp, zero 2, bf16",
    "tensor 4, shared key heads", "tensor 2, pipeline 2", "context 4, recomputed",
}  # fmt: skip
"""Measured with `BD3_ALL_LAYOUTS=1` only."""
assert LAYOUTS.keys() >= SAID_BY_OTHERS
MEASURED = {name: one for name, one in LAYOUTS.items() if ALL or name not in SAID_BY_OTHERS}


@pytest.fixture(scope="module")
def measured(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    folder = tmp_path_factory.mktemp("memory")
    results: dict[str, list[dict[str, int]]] = {}
    for world_size in (1, 2, 4):
        plan, out = folder / f"plan-{world_size}.json", folder / f"out-{world_size}.json"
        # Two micro-batches of every replica, and as many as there are stages.
        batch = f"training.global_batch={max(8, 4 * world_size)}"
        items = [(name, str(recipe), [*MODEL, batch, *overrides]) for name, (size, overrides) in MEASURED.items() if size == world_size]
        plan.write_text(json.dumps(items))
        finished = run_ranks(world_size, ["tests/distributed/memory_worker.py", str(plan), str(out)], plan.with_suffix(".log"), timeout=300)
        assert finished.status == 0, finished.output[-6000:]
        results |= json.loads(out.read_text())
    return results


@pytest.mark.parametrize("kind", ["state", "activations"])
@pytest.mark.parametrize("name", MEASURED)
def test_every_rank_holds_what_the_plan_says(
    measured: dict[str, list[dict[str, int]]], name: str, kind: str, record_property: Callable[[str, object], None]
) -> None:
    ranks = [(rank[kind], rank[f"planned_{kind}"]) for rank in measured[name]]
    shown = ", ".join(f"{found / 2**20:.2f} of {planned / 2**20:.2f} MiB" for found, planned in ranks)
    record_property("table", f"{LAYOUTS[name][0]} processes, {name:32s} {kind:11s} {shown}")
    ratios = [found / planned for found, planned in ranks]
    near = 0.02 if kind == "state" else 0.1
    assert all(1 - near < ratio < 1 + near for ratio in ratios), ratios


def test_state_falls_with_the_ranks_that_share_it(measured: dict[str, list[dict[str, int]]]) -> None:
    most = {name: max(rank["state"] for rank in ranks) for name, ranks in measured.items()}
    assert most["data 4, zero 2, bf16"] < 0.7 * most["data 4, zero 1"] < 0.7 * 0.6 * most["data 4, zero 0"]
    assert most["tensor 2, sequence"] < 0.6 * most["zero 1"] and most["pipeline 2, zero 0"] < 0.75 * most["zero 0"]
