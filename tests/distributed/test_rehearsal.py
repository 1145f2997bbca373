"""One process as a rank of 8, 64 or 512: every shipped recipe is rehearsed, and the real engines move the bytes that the plan says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.forked import run_ranks
from tests.distributed.launch import ALL, take_turn
from tests.unit.test_recipes import RECIPES, WORLD_SIZES

TINY = ["model.layers=4", "model.hidden=128", "model.key_value_heads=null", "model.dropout=0", "training.global_batch=16",
        "model.context=128", "parallel.micro_batch=2"]  # fmt: skip
BF16, SEQUENCE, RECOMPUTE = "training.precision=bf16", "parallel.sequence=true", "training.recompute=layer"
SHARED = ["model.key_value_heads=2", "model.query_key_norm=true", "model.attention_bias=all", "model.mlp_bias=true", "model.norm_bias=true"]
OLMO = ["model.key_value_heads=2", "model.query_key_norm=true", "model.query_key_norm_width=heads", "model.norm_place=after"]
FSDP, DEEPSPEED = "parallel.engine=fsdp", "parallel.engine=deepspeed"
LONG = "owt_1b_32k"
"""A recipe whose rows are so long that its rehearsal takes minutes."""
REHEARSED = [path for path in RECIPES if path.stem != LONG and (ALL or path.stem != "owt_1b_stream")]
"""A recipe that differs from another in its data alone (tests/unit/test_recipes.py) is rehearsed with `BD3_ALL_LAYOUTS=1`."""
MUON, CONTEXT, RING = "training.optimizer=muon", "parallel.context=2", "parallel.context_exchange=ring"
ADALN = ["model.conditioning=adaln", "model.conditioning_size=32"]


def layout(tensor: int, pipeline: int, zero: int, *more: str) -> list[str]:
    return [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.zero={zero}", *more]


TRAFFIC: dict[str, tuple[int, int, list[str]]] = {
    # name: (world size, rank, layout)
    "data 4, zero 0": (4, 0, layout(1, 1, 0)),
    "data 4, zero 1": (4, 1, layout(1, 1, 1)),
    "data 4, zero 1, bf16": (4, 0, layout(1, 1, 1, BF16)),
    "data 4, deepspeed, zero 0": (4, 0, layout(1, 1, 0, DEEPSPEED)),
    "data 4, deepspeed, zero 1": (4, 1, layout(1, 1, 1, DEEPSPEED)),
    "data 4, deepspeed, zero 1, bf16": (4, 0, layout(1, 1, 1, BF16, DEEPSPEED)),
    "data 4, zero 2, bf16": (4, 0, layout(1, 1, 2, BF16)),
    "data 4, zero 3": (4, 0, layout(1, 1, 3)),
    "data 4, zero 3, bf16": (4, 0, layout(1, 1, 3, BF16)),
    "tensor 2": (2, 0, layout(2, 1, 1)),
    "tensor 2, recomputed": (2, 1, layout(2, 1, 1, RECOMPUTE)),
    "tensor 2, attention recomputed": (2, 1, layout(2, 1, 1, "training.recompute=attention")),
    "tensor 2, sequence": (2, 1, layout(2, 1, 1, SEQUENCE)),
    "tensor 2, sequence, deepspeed, adaln": (2, 1, layout(2, 1, 1, SEQUENCE, DEEPSPEED, *ADALN)),
    "tensor 2, sequence, attention recomputed": (2, 1, layout(2, 1, 1, SEQUENCE, "training.recompute=attention")),
    "tensor 2, sequence, dropout, MLPs recomputed": (
        2, 0, layout(2, 1, 1, SEQUENCE, "training.recompute=mlp", "model.dropout=0.1")
    ),
    "tensor 2, sequence, recomputed, bf16": (2, 0, layout(2, 1, 1, SEQUENCE, RECOMPUTE, BF16)),
    "tensor 2, sequence, sedd": (2, 0, layout(2, 1, 1, SEQUENCE, "objective.kind=sedd", "objective.block_size=null", *ADALN)),
    "tensor 2, sequence, ssdlm": (2, 0, layout(2, 1, 1, SEQUENCE, "objective.kind=ssdlm", "objective.block_size=16", *ADALN)),
    "tensor 4, shared key heads": (4, 3, layout(4, 1, 1, *SHARED)),
    "tensor 4, sequence, shared key heads, learned": (4, 1, layout(4, 1, 1, SEQUENCE, "model.positions=learned", *SHARED)),
    "tensor 4, shared key heads, norms over heads and behind, attention recomputed": (
        4, 1, layout(4, 1, 1, "training.recompute=attention", *OLMO)
    ),
    "tensor 2, sequence, norms over heads, before and behind, MLPs recomputed": (
        2, 1, layout(2, 1, 1, SEQUENCE, "training.recompute=mlp", *OLMO, "model.norm_place=both")
    ),
    "tensor 2, data 4, sequence, adaln, dropout, recomputed": (
        8, 1, layout(2, 1, 1, SEQUENCE, RECOMPUTE, "model.dropout=0.1", *ADALN)
    ),
    "pipeline 2, data 2, bf16": (4, 0, layout(1, 2, 1, BF16)),
    "pipeline 4, a middle stage, data 2, zero 0": (8, 3, layout(1, 4, 0)),
    "pipeline 2 x 2, tied, adaln": (2, 1, layout(1, 2, 1, "parallel.virtual_stages=2", "model.tied_head=true", *ADALN)),
    "tensor 2, pipeline 2 x 2, data 2, sequence, tied, adaln": (
        8, 5, layout(2, 2, 1, SEQUENCE, "parallel.virtual_stages=2", "model.tied_head=true", *ADALN)
    ),
    "pipeline 2, data 2, zero 2": (4, 0, layout(1, 2, 2)),
    "pipeline 2, data 2, bf16, zero 3": (4, 2, layout(1, 2, 3, BF16)),
    "pipeline 4, a middle stage, data 2, zero 3": (8, 2, layout(1, 4, 3)),
    "data 4, fsdp, zero 3": (4, 0, layout(1, 1, 3, FSDP)),
    "data 4, fsdp, tied, ssdlm, recomputed, zero 3": (
        4, 0, layout(1, 1, 3, FSDP, RECOMPUTE, "objective.kind=ssdlm", "objective.block_size=16", "model.tied_head=true", *ADALN)
    ),
    "data 4, fsdp, ssdlm, zero 3": (4, 0, layout(1, 1, 3, FSDP, "objective.kind=ssdlm", "objective.block_size=16", *ADALN)),
    "data 8, fsdp, shard 4, bf16, zero 3": (8, 0, layout(1, 1, 3, FSDP, BF16, "parallel.shard=4")),
    "tensor 2, pipeline 2 x 2, data 2, sequence, tied, adaln, learned, zero 3": (
        8, 5, layout(2, 2, 3, SEQUENCE, "parallel.virtual_stages=2", "model.tied_head=true", "model.positions=learned", *ADALN)
    ),
    "pipeline 2 x 2, data 4, shard 2, tied, adaln, zero 2": (
        8, 0, layout(1, 2, 2, "parallel.virtual_stages=2", "parallel.shard=2", "model.tied_head=true", *ADALN)
    ),
    "context 2, data 2": (4, 1, layout(1, 1, 1, CONTEXT)),
    "context 2, data 2, zero 3, bf16": (4, 0, layout(1, 1, 3, CONTEXT, BF16)),
    "tensor 2, context 2, data 2, sequence, fsdp, recomputed, zero 3": (8, 2, layout(2, 1, 3, CONTEXT, SEQUENCE, FSDP, RECOMPUTE)),
    "tensor 2, context 4, data 2, ring": (16, 2, layout(2, 1, 1, "parallel.context=4", RING)),
    "context 2, data 2, ring, fsdp, recomputed, bf16, zero 3": (4, 1, layout(1, 1, 3, CONTEXT, RING, FSDP, RECOMPUTE, BF16)),
    "pipeline 2, context 2, data 4, ar, shard 2, zero 2": (
        16, 9, layout(1, 2, 2, CONTEXT, "parallel.shard=2", "objective.kind=ar", "objective.block_size=null")
    ),
    # Owners of matrices are spread evenly here: a rank sends what the formula says of the mean
    "tensor 2, muon": (2, 0, layout(2, 1, 1, MUON)),
    "tensor 2, data 4, fsdp, muon, zero 3": (8, 2, layout(2, 1, 3, FSDP, MUON)),
    "data 4, muon, bf16, zero 3": (4, 0, layout(1, 1, 3, BF16, MUON)),
}  # fmt: skip
FSDP_ROWS = [name for name in TRAFFIC if "fsdp" in name or ("pipeline" in name and name.split(", ")[-1] in ("zero 2", "zero 3"))]
LARGE = Path(__file__).resolve().parents[2] / "recipes" / "owt_7b.yaml"
COPIES = ["parallel.pipeline=2", "parallel.zero=3", "parallel.shard=4"]
WRONG = ["parallel.tensor=3"]
WIDE = ["training.global_batch=1024", "parallel.engine=auto", "parallel.shard=null"]


@pytest.fixture(scope="module")
def found(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rehearsal")
    plan: list[tuple[str, str, str, int, list[str], int]] = [
        ("traffic", name, str(recipe), world, [*TINY, *overrides], rank) for name, (world, rank, overrides) in TRAFFIC.items()
    ]
    plan += [("rehearse", path.stem, str(path), WORLD_SIZES.get(path.stem, 1), [], 0) for path in REHEARSED]
    plan += [
        ("rehearse", "512 ranks", str(LARGE), 512, [*WIDE, "parallel.zero=0", "training.precision=fp32"], 0),
        (
            "rehearse",
            "copies",
            str(LARGE.with_name("owt_110m.yaml")),
            16,
            ["parallel.pipeline=2", "parallel.zero=3", "parallel.shard=4"],
            0,
        ),
        ("rehearse", "wrong", str(LARGE), 64, WRONG, 0),
        ("broken", "broken", str(LARGE), 64, [], 0),
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    arguments = ["tests/distributed/rehearsal_worker.py", str(folder / "plan.json"), str(folder / "out.json")]
    take_turn(2)  # minutes of one core, beside which four ranks in step with each other would crawl
    finished = run_ranks(1, arguments, folder / "log", timeout=900)
    assert finished.status == 0, finished.output[-6000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("name", TRAFFIC)
def test_a_step_moves_the_bytes_of_the_formula(found: dict[str, Any], name: str, record_property: Callable[[str, object], None]) -> None:
    counted, formula = found[name]["counted"], found[name]["formula"]
    shown = ", ".join(f"{key} {number:,}" for key, number in sorted(counted.items()))
    record_property("table", f"moved in a step, {name:54s} {shown}")
    assert counted.keys() == formula.keys()
    for key, number in counted.items():
        assert formula[key] == pytest.approx(number, rel=1e-3), key


@pytest.mark.parametrize("name", FSDP_ROWS)
def test_a_step_of_fsdp_is_counted_exactly_and_reads_nothing(found: dict[str, Any], name: str) -> None:
    assert found[name]["counted"] == found[name]["formula"]
    assert found[name]["reads"] == 0


@pytest.mark.parametrize("name", [*(path.stem for path in REHEARSED), "512 ranks", "copies"])
def test_every_recipe_passes_its_rehearsal(found: dict[str, Any], name: str) -> None:
    lines = found[name].get("lines")
    assert lines, found[name]
    assert lines[0].startswith("rank 0 of") and any("two steps of" in line for line in lines)
    if name in WORLD_SIZES:
        assert any(line.startswith(f"rank {WORLD_SIZES[name] - 1} of {WORLD_SIZES[name]} (last)") for line in lines)


def test_a_wrong_layout_fails_with_the_message_of_the_cluster(found: dict[str, Any]) -> None:
    from bd3_scale import recipe as recipes
    from bd3_scale.errors import RecipeError
    from bd3_scale.rules.validate import validate

    with pytest.raises(RecipeError) as error:
        validate(recipes.load(LARGE, WRONG), 64, "cuda")
    assert found["wrong"] == {"error": str(error.value), "kind": "RecipeError"}


def test_a_stage_that_hands_on_another_shape_is_found(found: dict[str, Any]) -> None:
    assert found["broken"]["kind"] == "TrainingError"
    assert "rank 0 of 64" in found["broken"]["error"] and "[511, 2, 4096]" in found["broken"]["error"]
