"""The parts of a step at their limits: their FLOPs are the network's, their bytes what kernels were counted to move, their sum the step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bd3_scale import recipe as recipes
from bd3_scale.planning.cluster_plan import ClusterPlan, cluster_plan
from bd3_scale.planning.devices import DEVICES, device_named
from bd3_scale.planning.estimate import pace, row_flops, step_time
from bd3_scale.planning.limits import StageLimits, product_seconds, visited_tiles
from bd3_scale.planning.report import as_text, make_plan

ROOT = Path(__file__).resolve().parents[3]
ALONE = ["parallel.zero=1", "parallel.engine=auto", "parallel.shard=null", "training.global_batch=64"]


def cluster(name: str, *overrides: str, world_size: int = 1, device: str = "h100") -> ClusterPlan:
    recipe = recipes.load(ROOT / "recipes" / f"{name}.yaml", [*ALONE, *overrides])
    return cluster_plan(recipe, world_size, device_named(device, world_size), 50258)


def limits(one: ClusterPlan, phase: int = -1) -> StageLimits:
    found = pace(one, one.phases[phase]).limits
    assert found is not None
    return found


def part(found: StageLimits, name: str) -> float:
    return next(one.seconds for one in found.parts if one.name.startswith(name))


@pytest.mark.parametrize("name", ["owt_1b", "owt_110m"])
@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("recompute", ["none", "attention", "mlp", "layer"])
def test_products_are_those_of_the_network(name: str, phase: int, recompute: str) -> None:
    one = cluster(name, f"training.recompute={recompute}")
    found, row = limits(one, phase), row_flops(one, one.phases[phase])
    flops = {each.name: each.flops for each in found.parts}
    once_more = {"attention": row.projections, "mlp": row.mlp, "layer": row.projections + row.mlp}.get(recompute, 0)
    expected = one.shares().micro_batch * (3 * (row.projections + row.mlp) + once_more)
    assert flops["linears"] == pytest.approx(expected, rel=2e-3), "selected positions are whole, and padded"
    assert flops["head's products"] == pytest.approx(one.shares().micro_batch * 3 * row.head, rel=4e-3)
    times = 3.5 + (recompute in ("attention", "layer"))
    assert one.shares().micro_batch * times * row.attention <= flops["attention"] <= 1.3 * one.shares().micro_batch * times * row.attention


def test_tiles_are_visited_whole() -> None:
    """24 partly and 56 wholly visible tiles at L = 1024, L' = 16; one stream of L rows has 64."""
    one = cluster("owt_1b")
    full, blocks = (phase.pattern for phase in one.phases)
    assert visited_tiles(blocks, blocks.rows) == 80 and visited_tiles(full, full.rows) == 64


COUNTED = {("owt_1b", "none"): 301e9, ("owt_1b", "blocks"): 95e9, ("owt_110m", "none"): 139e9, ("owt_110m", "blocks"): 22.7e9}
"""Bytes of the layers' elementwise kernels, counted launch by launch on a stub of the CUDA driver (8 x 1024 tokens, L' = 16)."""


@pytest.mark.parametrize(("name", "compile"), COUNTED)
def test_bytes_are_those_that_kernels_were_counted_to_move(name: str, compile: str) -> None:
    one = cluster(name, f"training.compile={compile}")
    (moved,) = (each.bytes for each in limits(one).parts if each.name == "elementwise of the layers")
    assert moved == pytest.approx(COUNTED[name, compile], rel=0.06)


def test_terms_follow_what_they_are_made_of() -> None:
    eager, compiled = limits(cluster("owt_1b", "training.compile=none")), limits(cluster("owt_1b"))
    assert part(eager, "elementwise") > 3 * part(compiled, "elementwise") and eager.host > 2 * compiled.host
    assert part(eager, "linears") == part(compiled, "linears")
    one, two = limits(cluster("owt_1b", "parallel.micro_batch=4")), limits(cluster("owt_1b", "parallel.micro_batch=8"))
    assert part(two, "elementwise") == pytest.approx(2 * part(one, "elementwise"), rel=1e-3)
    assert part(two, "gradients") == part(one, "gradients") and one.update == two.update
    assert part(one, "linears") > 0.5 * part(two, "linears"), "weights are read for fewer rows"
    alone, shared = limits(cluster("owt_1b")), limits(cluster("owt_1b", world_size=8))
    assert 1 / 8 < shared.update.seconds / alone.update.seconds < 1 / 4, "ZeRO 1 divides all but the gradients"
    half = limits(cluster("owt_1b", "parallel.tensor=2", world_size=2))
    assert 0.5 < part(half, "linears") / part(alone, "linears") < 0.6
    narrow, wide = limits(cluster("owt_110m")), limits(cluster("owt_110m", "parallel.micro_batch=32"))
    assert (narrow.waited == 0) == (narrow.host <= narrow.device) and wide.waited == 0
    assert wide.host == pytest.approx(narrow.host, rel=0.1), "as many kernels, of more rows"


def test_products_reach_less_where_they_are_narrow_and_never_the_peak() -> None:
    for device in DEVICES.values():
        reached = [2 * 16384 * n * n / product_seconds(device, "bf16", 2, 16384, n, n) for n in (256, 768, 2048, 8192)]
        assert reached == sorted(reached) and reached[-1] < device.reached.product * device.peak("bf16")


def test_a_step_is_the_sum_of_its_parts_and_a_given_share_of_the_peak_replaces_them() -> None:
    one = cluster("owt_110m")
    plan = make_plan(one)
    for phase, planned in zip(one.phases, plan.phases, strict=True):
        step = step_time(one, phase)
        assert sum(each.seconds for each in planned.limits) == pytest.approx(step.compute + step.update)
        assert planned.step_seconds == step.total == pytest.approx(step.compute + step.update + step.host)
        flops = one.recipe.tokens_before(1) * planned.flops_per_token
        assert planned.mfu == pytest.approx(flops / step.total / one.device.peak("bf16"))
    text = as_text(plan)
    for name in ("linears", "attention", "elementwise of the layers", "head's loss", "optimizer, clip, EMA", "MFU", "3.35 TB/s"):
        assert name in text
    given = make_plan(one, 0.4)
    assert not given.phases[0].limits and "limits of a step" not in as_text(given) and "40% assumed" in as_text(given)
    assert given.phases[0].mfu == pytest.approx(0.4)


def test_what_a_device_reaches_is_said_in_one_place() -> None:
    """A measured number changes its own term, and no other."""
    one = cluster("owt_1b")
    slow = replace(one.device, reached=replace(one.device.reached, flex=(0.45, 0.425)))
    before, after = limits(one), limits(replace(one, device=slow))
    assert part(after, "attention") == pytest.approx(2 * part(before, "attention"))
    assert after.device - before.device == pytest.approx(part(before, "attention"))
