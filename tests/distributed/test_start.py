"""A start in parts: no rank ever holds more of the network than it keeps, and a strip or a layer beside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.forked import run_ranks

MODEL = ["model.layers=6", "model.hidden=1024", "model.heads=16", "model.key_value_heads=null", "parallel.zero=3"]
"""100 million parameters: 75 in layers, 25 in the embedding and the head."""
LAYOUTS = {"data 4": ["parallel.engine=fsdp"], "pipeline 2, data 2": ["parallel.pipeline=2"]}
BF16 = "training.precision=bf16"
OTHERS = {
    "deepspeed, zero 3": ["parallel.engine=deepspeed"],
    "deepspeed, zero 3, bf16": ["parallel.engine=deepspeed", BF16],
    "deepspeed, zero 2": ["parallel.engine=deepspeed", "parallel.zero=2"],
    "megatron, zero 1, bf16": ["parallel.zero=1", BF16],
}
"""Engines that keep weights apart from masters, or whole."""


@pytest.fixture(scope="module")
def measured(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    folder = tmp_path_factory.mktemp("start")
    plan, out = folder / "plan.json", folder / "out.json"
    plan.write_text(json.dumps([(name, str(recipe), [*MODEL, *overrides]) for name, overrides in (LAYOUTS | OTHERS).items()]))
    finished = run_ranks(4, ["tests/distributed/start_worker.py", str(plan), str(out)], folder / "log", timeout=300)
    assert finished.status == 0, finished.output[-6000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_holds_its_share_and_a_layer(
    measured: dict[str, list[dict[str, int]]], name: str, record_property: Callable[[str, object], None]
) -> None:
    ranks = measured[name]
    shown = ", ".join(f"{rank['most'] / 2**20:.0f} of {rank['held'] / 2**20:.0f} MiB kept" for rank in ranks)
    record_property("table", f"at most while a network of 100M starts, {name:20s} {shown}")
    assert sum(rank["elements"] for rank in ranks) > 100e6
    for rank in ranks:
        assert rank["held"] < 0.4 * 4 * 100e6, "a share"
        assert rank["held"] <= rank["most"] < 1.3 * rank["held"] + rank["layer"]


@pytest.mark.parametrize("name", OTHERS)
def test_no_second_copy_is_made(
    measured: dict[str, list[dict[str, int]]], name: str, record_property: Callable[[str, object], None]
) -> None:
    ranks = measured[name]
    shown = ", ".join(f"{rank['most'] / 2**20:.0f} of {rank['state'] / 2**20:.0f} MiB kept" for rank in ranks)
    record_property("table", f"at most while a network of 100M starts, {name:24s} {shown}")
    assert sum(rank["elements"] for rank in ranks) > 100e6
    for rank in ranks:
        assert "zero 3" not in name or rank["state"] < 3.2 * 100e6, "a share of weights, masters and gradients"
        assert rank["most"] < 1.3 * rank["state"] + rank["copied"] + rank["layer"]


def test_every_group_waits_as_long_as_the_recipe_says(measured: dict[str, list[dict[str, int]]]) -> None:
    """megatron-core's groups, DeepSpeed's and those of meshes: left alone they wait for 30 minutes (NCCL's for 10)."""
    assert [rank["timeouts"] for ranks in measured.values() for rank in ranks] == [[120.0]] * 4 * len(measured)


def test_a_group_connects_only_those_that_talk(measured: dict[str, list[dict[str, int]]]) -> None:
    """Eight groups of all ranks are made, and each that connected everybody would have three sockets here, a thousand at 1,024 ranks."""
    assert all(rank["connected"] <= 12 for ranks in measured.values() for rank in ranks), {
        name: [rank["connected"] for rank in ranks] for name, ranks in measured.items()
    }
