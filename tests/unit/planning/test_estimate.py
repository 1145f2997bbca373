"""A plan's numbers are those of the network and of the formulas that are tested against it; its time follows its assumptions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bd3_scale import recipe as recipes
from bd3_scale.costs.state_memory import state_bytes
from bd3_scale.engines.initialise import initialise
from bd3_scale.errors import RecipeError
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import BlockDiffusion
from bd3_scale.planning.cluster_plan import ClusterPlan, cluster_plan
from bd3_scale.planning.devices import DEVICES, device_named
from bd3_scale.planning.estimate import bandwidth, bubble_fraction, pace, rank_memory, stage_flops, step_time, traffic_of
from bd3_scale.planning.report import as_text, make_plan
from bd3_scale.planning.search import _layouts, search
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.schema import ModelConfig
from bd3_scale.rules.across_keys import works
from bd3_scale.rules.suggestions import Case

ROOT = Path(__file__).resolve().parents[3]
V = 211
MODELS = {
    "plain": ModelConfig(context=128, layers=4, hidden=64, heads=4, attention="dense"),
    "llama": ModelConfig(context=128, layers=3, hidden=64, heads=4, key_value_heads=2, norm="rmsnorm", mlp="swiglu", attention="dense"),
    "paper": ModelConfig(context=128, layers=3, hidden=64, heads=4, conditioning="adaln", conditioning_size=8, mlp_bias=True,
                         head_bias=True, attention="dense"),
}  # fmt: skip


def small(model: ModelConfig, block_size: int = 8) -> Recipe:
    recipe = Recipe()
    training = replace(recipe.training, steps=10, global_batch=4)
    parallel = replace(recipe.parallel, micro_batch=2)
    return replace(recipe, model=model, training=training, parallel=parallel, objective=replace(recipe.objective, block_size=block_size))


def large(name: str, world_size: int = 64, device: str = "h100", *overrides: str) -> ClusterPlan:
    recipe = recipes.load(ROOT / "recipes" / f"{name}.yaml", list(overrides))
    return cluster_plan(recipe, world_size, device_named(device, world_size), 50258)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_are_those_of_the_network(name: str, world_of_one: object) -> None:
    config = MODELS[name]
    plan = make_plan(cluster_plan(small(config), 1, device_named("cpu", 1), V), mfu=0.4)
    network = Transformer(config, V, V - 1)
    initialise(network, config, seed=0)
    assert plan.total_parameters == sum(p.numel() for p in network.parameters())

    objective = BlockDiffusion(V - 1, config.context, 8)
    rows = np.random.default_rng(0).integers(0, V - 1, (16, config.context))
    inputs = objective.training_inputs(rows, np.arange(16), 0, 0, 16)

    def visible_pairs(q: tuple[int, ...], *unused: object, out_shape: object = None, **also: object) -> int:
        # A dense kernel computes four times what is visible: count the visible pairs, which `test_flops.py` holds to the mask.
        batch, heads, queries, width = q
        pairs = inputs.pattern.visible_pairs if queries == inputs.pattern.rows else config.context * (config.context + 8) // 2
        return 4 * batch * heads * width * pairs

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={attention: visible_pairs}) as counter:
        network(inputs)[0].backward()
    ran = counter.get_flop_counts()["Global"]
    # The backward of this kernel has no formula in torch: it is twice the forward.
    measured = (sum(ran.values()) + 2 * ran[attention]) / (16 * config.context)
    assert plan.phases[0].flops_per_token == pytest.approx(measured, rel=0.01)
    assert plan.flops == pytest.approx(plan.phases[0].flops_per_token * plan.tokens)


def test_state_is_that_of_the_formula_which_is_measured() -> None:
    for cluster in (large("owt_7b"), large("owt_1b", 64, "h100", "parallel.zero=3")):
        for rank in range(cluster.parallel.pipeline):
            memory = rank_memory(cluster, rank)
            state = state_bytes(
                cluster.model,
                cluster.training,
                cluster.parallel,
                cluster.stages_of(rank),
                cluster.vocabulary,
                cluster.replicas,
                "cuda",
                bf16=True,
            )
            assert memory.state + state.buckets == state.total
            assert memory.total == memory.state + memory.activations + memory.logits + memory.buffers


def test_plans_say_what_fits() -> None:
    """6.2B parameters: 20 bytes each do not fit one GPU; a larger micro-batch needs more, recomputation less; ZeRO divides."""
    assert make_plan(large("owt_7b"), 0.4).fits
    alone = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.virtual_stages=1", "parallel.sequence=false", "parallel.micro_batch=1",
             "parallel.shard=null"]  # fmt: skip
    assert not make_plan(large("owt_7b", 1, "h100", *alone), 0.4).fits
    assert "DOES NOT FIT" in as_text(make_plan(large("owt_7b", 1, "h100", *alone), 0.4))
    ends = "texts of this model end at"
    assert ends in as_text(make_plan(large("owt_7b", 64, "h100", "data.row_special=bos_eos"), 0.4))
    assert ends not in as_text(make_plan(large("owt_7b", 64, "h100", "data.row_special=none"), 0.4))
    eight, sixteen, again = (
        rank_memory(large("owt_1b", 32, "h100", *more), 0).activations
        for more in (["parallel.micro_batch=8"], ["parallel.micro_batch=16"], ["parallel.micro_batch=8", "training.recompute=layer"])
    )
    assert sixteen == pytest.approx(2 * eight, rel=0.05) and again < 0.15 * eight


def test_phases_are_the_stages_of_the_block_size_within_the_budget() -> None:
    plan = make_plan(large("owt_1b"), 0.4)
    assert [(phase.steps, phase.block_size) for phase in plan.phases] == [(425_000, 1024), (75_000, 16)]
    assert 1.8 < plan.phases[1].flops_per_token / plan.phases[0].flops_per_token < 2.0, "one stream, then two"
    assert plan.seconds == pytest.approx(sum(phase.steps * phase.step_seconds for phase in plan.phases))
    short = make_plan(large("owt_1b", 64, "h100", "training.tokens=null", "training.steps=1000"), 0.4)
    assert [(phase.steps, phase.block_size) for phase in short.phases] == [(1000, 1024)]


def test_phases_are_those_of_the_batch_too_and_memory_is_that_of_the_fullest() -> None:
    ramp, alone = "training.global_batch=[[0,256],[2560,512],[8000,1024]]", ["parallel.micro_batch=null", "training.tokens=null"]
    cluster = large("owt_1b", 32, "h100", ramp, *alone, "training.steps=100", "objective.block_size=[[0,1024],[15,16]]")
    plan = make_plan(cluster, 0.4)
    assert [(one.steps, one.block_size, one.global_batch) for one in plan.phases] == [
        (10, 1024, 256), (5, 1024, 512), (6, 16, 512), (79, 16, 1024)
    ]  # fmt: skip
    assert plan.tokens == 1024 * (10 * 256 + 11 * 512 + 79 * 1024) and plan.tokens_per_step == 1024 * 1024
    assert plan.seconds == pytest.approx(sum(phase.steps * phase.step_seconds for phase in plan.phases))
    constant = make_plan(
        large("owt_1b", 32, "h100", "training.global_batch=1024", *alone, "training.steps=79", "objective.block_size=16"), 0.4
    )
    assert plan.memory == constant.memory and plan.layout == constant.layout and plan.bubble == constant.bubble
    assert plan.phases[3].step_seconds == pytest.approx(constant.phases[0].step_seconds)
    assert "79 steps at L' = 16, 1024 rows: " in as_text(plan)


def test_time_is_the_flops_over_the_assumed_speed_on_one_device_and_more_on_many() -> None:
    one = large("owt_110m", 1, "h100", "parallel.shard=null")
    plan = make_plan(one, mfu=0.5, rate=2.0)
    assert plan.phases[0].mfu == pytest.approx(0.5) and plan.bubble == 0 and not plan.traffic
    assert plan.flops / plan.seconds == pytest.approx(0.5 * one.device.peak("bf16"))
    assert plan.price == pytest.approx(2.0 * plan.seconds / 3600)
    many = make_plan(large("owt_110m", 64, "h100", "parallel.zero=1", "parallel.engine=auto", "parallel.shard=null"), mfu=0.5)
    assert many.phases[0].mfu < 0.5 and many.seconds > plan.seconds / 64
    again = make_plan(large("owt_110m", 1, "h100", "parallel.shard=null", "training.recompute=layer"), mfu=0.5)
    assert plan.seconds < again.seconds < 4 / 3 * plan.seconds


def test_bubbles_shrink_with_micro_batches_and_interleaving_and_stages_share_the_flops() -> None:
    cluster = large("owt_7b")
    assert bubble_fraction(cluster) == pytest.approx(1 / (4 * 16 + 1))
    phase = cluster.phases[0]
    assert pace(cluster, phase, 0.4).rank in range(2)
    whole = large("owt_7b", 64, "h100", "parallel.pipeline=1", "parallel.virtual_stages=1", "parallel.engine=fsdp")
    total = sum(stage_flops(cluster, phase, rank) for rank in range(2))
    assert total == pytest.approx(stage_flops(whole, phase, 0))
    step = step_time(cluster, phase, 0.4)
    assert step.bubble / step.compute == pytest.approx(1 / (4 * 16)), "one virtual stage at a time"


def test_a_search_lists_what_works_and_fits_best_first() -> None:
    cluster = large("owt_1b")
    found = search(cluster, 0.4, most=6)
    assert len(found) == 6 and [one.seconds for one in found] == sorted(one.seconds for one in found)
    for one in found:
        recipe = recipes.load(ROOT / "recipes" / "owt_1b.yaml", one.overrides)
        assert works(Case(recipe, 64, "cuda", "bf16"))
        plan = make_plan(cluster_plan(recipe, 64, cluster.device, 50258), 0.4)
        assert plan.fits and plan.seconds == pytest.approx(one.seconds) and plan.memory[plan.fullest].total == one.memory
    assert found[0].seconds <= make_plan(cluster, 0.4).seconds
    assert search(large("owt_7b", 1, "a100-40", "parallel.tensor=1", "parallel.pipeline=1", "parallel.virtual_stages=1",
                        "parallel.sequence=false", "parallel.shard=null"), 0.4) == []  # fmt: skip


def test_stages_divide_gradients_and_weights_with_fsdp() -> None:
    one, two, three = (rank_memory(large("owt_7b", 64, "h100", f"parallel.zero={zero}", "parallel.shard=null"), 0) for zero in (1, 2, 3))
    assert two.gradients == pytest.approx(one.gradients / 16, rel=1e-3) == three.gradients
    assert two.weights == pytest.approx(one.weights, rel=1e-3) and three.weights == 0
    assert three.total < two.total < one.total


def test_a_copy_on_each_node_gathers_inside_of_it() -> None:
    fsdp = ["parallel.zero=3", "parallel.engine=fsdp", "parallel.tensor=1", "parallel.sequence=false"]
    over_all = large("owt_1b", 64, "h100", *fsdp, "parallel.shard=null")
    copies = large("owt_1b", 64, "h100", *fsdp, "parallel.shard=8")
    assert bandwidth(copies, "data") > bandwidth(copies, "copies") == bandwidth(over_all, "data")
    assert {(one.group, one.ranks) for one in traffic_of(copies, copies.longest, 0)} == {("data", 8), ("copies", 8)}
    assert rank_memory(copies, 0).optimizer == pytest.approx(8 * rank_memory(over_all, 0).optimizer, rel=1e-2)
    assert step_time(copies, copies.phases[0], 0.4).data <= step_time(over_all, over_all.phases[0], 0.4).data
    tried = [(one.zero, one.resolved_engine, one.shard) for one in _layouts(large("owt_1b"), 1, 1, 2)]
    assert {(2, "fsdp", None), (3, "fsdp", None), (3, "fsdp", 8)} <= set(tried)


def test_the_table_of_devices_has_what_a_plan_asks() -> None:
    for device in DEVICES.values():
        assert device.peak("bf16") > 0 and device.inside >= device.outside > 0
    assert device_named("h100", 8, per_node=4, network=1e9).per_node == 4
    with pytest.raises(RecipeError, match="h100"):
        device_named("h1000", 8)
