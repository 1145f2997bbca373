"""Rules across keys: exactly what can work is accepted, and whatever is proposed instead works."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale import recipe as recipes
from bd3_scale.errors import RecipeError
from bd3_scale.recipe.schema import ModelConfig, ParallelConfig, TrainingConfig
from bd3_scale.rules.validate import validate
from tests.unit.refusing import refused

RING = "parallel.context=2 parallel.context_exchange=ring"


def cures(message: str) -> list[tuple[list[str], int | None]]:
    """What a message says to do: (overrides to set, ranks to start), one for each alternative."""
    found: list[tuple[list[str], int | None]] = []
    for text in re.split(r"; |, or | or (?=set )", message):
        if start := re.fullmatch(r"start (\d+) ranks", text):
            found.append(([], int(start[1])))
        elif set_to := re.fullmatch(r"set it to (\S+)", text):
            found.append(([f"{message.split(' ')[0]}={set_to[1]}"], None))
        elif keys := re.match(r"set ([a-z_]+\.[a-z_]+=\S+(?: and [a-z_]+\.[a-z_]+=\S+)*)", text):
            found.append((keys[1].rstrip(",").split(" and "), None))
    return found


@pytest.mark.parametrize(
    ("overrides", "world_size", "device", "proposed"),
    [
        ("model.heads=5", 1, "cpu", "set model.heads=4, or set model.hidden=30"),
        ("model.heads=32", 1, "cpu", "set model.heads=16"),
        ("model.positions=learned tracking.sample_tokens=100", 1, "cpu", "set tracking.sample_tokens=64"),
        ("objective.kind=sedd objective.block_size=null", 1, "cpu", "set model.conditioning=adaln, or set objective.kind=mdlm"),
        ("objective.kind=ssdlm", 1, "cpu", "set model.conditioning=adaln, or set objective.kind=bd3"),
        ("objective.kind=ssdlm model.conditioning=adaln objective.block_size=25", 1, "cpu", "set it to 32"),
        ("objective.kind=ssdlm model.conditioning=adaln objective.resample=true", 1, "cpu", "set objective.resample=false"),
        ("objective.kind=ssdlm model.conditioning=adaln tuner.enabled=true", 1, "cpu", "set tuner.enabled=false"),
        ("objective.kind=ssdlm model.conditioning=adaln objective.density=beta", 1, "cpu", "set objective.density=uniform"),
        ("objective.density=beta objective.density_shape=[2]", 1, "cpu", "set objective.density_shape=[2.0,2.0]"),
        ("objective.density=pareto objective.density_shape=[-1]", 1, "cpu", "set objective.density_shape=[-0.5]"),
        ("objective.density=pareto objective.interval=[0,1]", 1, "cpu", "set objective.interval=[0.001,1.0]"),
        ("objective.density=beta objective.interval=[1,1]", 1, "cpu", "set objective.density=uniform"),
        ("objective.density=beta objective.resample=true", 1, "cpu", "set objective.resample=false"),
        ("tuner.enabled=true tuner.kind=both objective.resample=true", 1, "cpu", "set objective.resample=false"),
        ("tuner.enabled=true tuner.kind=density objective.interval=[1,1]", 1, "cpu", "set objective.interval=[0.001,1.0]"),
        ("model.hidden=33", 1, "cpu", "set model.hidden=32"),
        ("model.hidden=36 model.heads=12", 1, "cpu", "set model.heads=9"),
        ("model.hidden=36 model.heads=12 model.key_value_heads=6", 1, "cpu", "set model.heads=6"),
        ("model.heads=8 model.key_value_heads=3", 1, "cpu", "set model.key_value_heads=2"),
        (
            "model.rotary_local=[10000,6] model.positions=learned",
            1,
            "cpu",
            "model.positions = learned turns nothing; set model.rotary_local=null, or set model.positions=rotary",
        ),
        (
            "model.query_key_norm_width=heads",
            1,
            "cpu",
            "that model.query_key_norm = false leaves out; set model.query_key_norm=true, or set model.query_key_norm_width=head",
        ),
        ("model.rotary_local=[10000,2.5]", 1, "cpu", "set model.rotary_local=[10000,6] (Gemma 3), or set model.rotary_local=null"),
        ("training.tokens=5", 1, "cpu", "set training.tokens=null"),
        ("training.steps=null", 1, "cpu", "set training.steps="),
        ("training.betas=[0.9,1.5]", 1, "cpu", "set training.betas="),
        ("training.learning_rate=inf", 1, "cpu", "set training.learning_rate="),
        ("training.precision=fp16", 1, "cuda", "set training.precision=bf16"),
        ("training.momentum=0.5", 1, "cpu", "set training.momentum=0.95, or set training.optimizer=muon"),
        ("model.dropout=1.5", 1, "cpu", "set model.dropout="),
        ("objective.block_size=7", 1, "cpu", "set it to 8"),
        ("objective.kind=ar", 1, "cpu", "set objective.block_size=null"),
        ("model.attention=flex", 1, "cpu", "set model.attention=auto"),
        ("model.attention=tiled", 1, "cuda", "set model.attention=auto"),
        ("model.attention=flex_triton", 1, "cpu", "set model.attention=auto"),
        ("model.attention=flex_flash training.precision=fp32", 1, "cuda", "set training.precision=bf16, or set model.attention=auto"),
        ("model.attention=flex_triton objective.kind=mdlm objective.block_size=null", 1, "cuda", "set model.attention=auto"),
        (f"{RING} model.attention=dense", 2, "cpu", "set model.attention=auto, or set parallel.context_exchange=gather"),
        (f"{RING} model.attention=flex_flash", 2, "cuda", "set model.attention=auto, or set parallel.context_exchange=gather"),
        (f"{RING} training.compile=blocks", 2, "cuda", "set training.compile=none, or set parallel.context_exchange=gather"),
        ("training.compile=max-autotune", 1, "cpu", "set training.compile=none, or set training.compile=blocks"),
        # Tensor parallelism: heads, key/value heads, MLP.
        ("parallel.tensor=2", 1, "cpu", "start 2 ranks, or set parallel.tensor=1"),
        ("parallel.tensor=3", 6, "cpu", "set parallel.tensor=2"),
        ("parallel.tensor=3", 12, "cpu", "set parallel.tensor=4"),
        ("parallel.tensor=8", 8, "cpu", "set parallel.tensor=4"),
        ("model.heads=12 model.hidden=48 model.key_value_heads=4 parallel.tensor=6", 12, "cpu", "set parallel.tensor=12"),
        ("model.mlp_hidden=66 parallel.tensor=4", 4, "cpu", "set parallel.tensor=2, or set model.mlp_hidden=68"),
        ("model.mlp_hidden=65 parallel.tensor=4", 4, "cpu", "set parallel.tensor=1, or set model.mlp_hidden=68"),
        # Rows over ranks.
        ("parallel.sequence=true", 1, "cpu", "set parallel.sequence=false"),
        ("parallel.sequence=true parallel.tensor=4 model.context=66 objective.block_size=2", 4, "cpu", "set parallel.sequence=false"),
        ("parallel.context=2 objective.block_size=[[0,96],[5,32]] model.context=96", 2, "cpu", "set parallel.context=1"),
        ("parallel.context=4 objective.block_size=32", 4, "cpu", "set parallel.context=2"),
        ("parallel.context=8 objective.block_size=16", 8, "cpu", "set parallel.context=4"),
        ("parallel.context=3 objective.block_size=64", 3, "cpu", "set parallel.context=1"),
        ("parallel.context=3 objective.kind=ar objective.block_size=null", 3, "cpu", "set parallel.context=1"),
        ("parallel.context=2 parallel.tensor=8", 8, "cpu", "set parallel.tensor=4"),
        ("parallel.context=2 parallel.tensor=2", 2, "cpu", "start 4 ranks, or set parallel.context=1"),
        ("parallel.context=4 parallel.tensor=4 parallel.sequence=true model.context=8", 16, "cpu", "set parallel.context=1"),
        # Pipelines.
        ("parallel.virtual_stages=2", 1, "cpu", "set parallel.virtual_stages=1"),
        ("parallel.pipeline=4", 4, "cpu", "set parallel.pipeline=2"),
        ("parallel.pipeline=2 parallel.virtual_stages=2", 2, "cpu", "set parallel.virtual_stages=1"),
        ("parallel.pipeline=2 parallel.virtual_stages=4 model.layers=6", 2, "cpu", "set parallel.virtual_stages=3"),
        ("parallel.stage_layers=[3]", 1, "cpu", "set parallel.stage_layers=null"),
        ("parallel.pipeline=2 parallel.stage_layers=[2,0]", 2, "cpu", "set parallel.stage_layers=null"),
        ("parallel.stage_layers=[]", 1, "cpu", "set parallel.stage_layers=null"),
        # Engines, and copies of what ZeRO divides.
        ("parallel.engine=deepspeed parallel.pipeline=2", 2, "cpu", "set parallel.engine=auto"),
        ("parallel.engine=megatron parallel.zero=2", 1, "cpu", "set parallel.engine=auto, or set parallel.zero=1"),
        ("parallel.engine=fsdp", 1, "cpu", "set parallel.engine=auto, or set parallel.zero=2"),
        ("parallel.engine=fsdp parallel.shard=2", 4, "cpu", "set parallel.zero=2"),
        ("parallel.shard=2 parallel.zero=3", 4, "cpu", "set parallel.engine=fsdp, or set parallel.shard=null"),
        ("parallel.shard=2 parallel.pipeline=2", 4, "cpu", "set parallel.shard=null"),
        ("parallel.shard=3 parallel.zero=3 parallel.engine=fsdp", 4, "cpu", "set parallel.shard=2"),
        ("parallel.shard=1 parallel.zero=3 parallel.engine=fsdp", 4, "cpu", "set parallel.shard=2"),
        ("parallel.shard=2 parallel.zero=3 parallel.engine=fsdp", 1, "cpu", "set parallel.shard=null"),
        ("parallel.shard=2 parallel.zero=2 parallel.pipeline=2 parallel.engine=deepspeed", 8, "cpu", "set parallel.engine=auto"),
        ("parallel.zero=0 training.precision=bf16", 1, "cpu", "set parallel.zero=1"),
        ("parallel.zero=0", 1, "cuda", "set parallel.zero=1"),
        # The world and the batch.
        ("parallel.tensor=4", 6, "cpu", "start 8 ranks, or set parallel.tensor=2"),
        ("parallel.tensor=2 parallel.pipeline=2", 2, "cpu", "start 4 ranks, or set parallel.pipeline=1"),
        ("parallel.tensor=2 parallel.pipeline=2 parallel.sequence=true", 3, "cpu", "start 4 ranks"),
        ("", 9, "cpu", "set training.global_batch=9"),
        ("parallel.micro_batch=2", 16, "cpu", "set training.global_batch=16, or set parallel.pipeline=2"),
        ("parallel.micro_batch=null", 16, "cpu", "set training.global_batch=16, or set parallel.pipeline=2"),
        ("model.heads=1", 17, "cpu", "set training.global_batch=17"),
        ("training.global_batch=[[0,4],[64,8],[256,32]]", 9, "cpu", "set training.global_batch=[[0,9],[256,32]]"),
        # Interleaving.
        (
            "model.layers=4 parallel.pipeline=2 parallel.virtual_stages=2 parallel.micro_batch=8",
            2,
            "cpu",
            "set parallel.micro_batch=4, or set parallel.virtual_stages=1",
        ),
        (
            "model.layers=8 parallel.pipeline=4 parallel.virtual_stages=2 parallel.micro_batch=null",
            16,
            "cpu",
            "set parallel.virtual_stages=1",
        ),
        ("model.layers=8 parallel.pipeline=4 parallel.virtual_stages=2 parallel.micro_batch=1", 24, "cpu", "set parallel.virtual_stages=1"),
        (
            "model.layers=4 parallel.pipeline=2 parallel.virtual_stages=2 parallel.micro_batch=4 training.global_batch=[[0,4],[64,16]]",
            2,
            "cpu",
            "set parallel.micro_batch=2, or set parallel.virtual_stages=1",
        ),
        (
            "model.layers=8 parallel.pipeline=4 parallel.virtual_stages=2 parallel.micro_batch=1",
            64,
            "cpu",
            "set training.global_batch=64, or set parallel.pipeline=8 and parallel.virtual_stages=1",
        ),
    ],
)
def test_the_cure_cures(base: Path, overrides: str, world_size: int, device: str, proposed: str) -> None:
    given = ["parallel.micro_batch=1", *overrides.split()]
    message = refused(base, given, world_size, device)
    assert proposed in message
    assert cures(message), message
    for keys, ranks in cures(message):
        validate(recipes.load(base, [*given, *keys]), ranks or world_size, device)


def layout_works(recipe: recipes.Recipe, world_size: int) -> bool:
    """What the layout needs, written down a second time."""
    model, asked, batch = recipe.model, recipe.parallel, recipe.training.global_batch
    tensor, stages, context = asked.tensor, asked.pipeline, asked.context
    replicas, rest = divmod(world_size, tensor * stages * context)
    chunks = stages * asked.virtual_stages
    if rest or model.heads % tensor or model.mlp_size % tensor or chunks > model.layers:
        return False
    for size in recipe.objective.sizes(model.context) if context > 1 else ():
        blocks, left = divmod(model.context, context * size)
        if left or (blocks > 1 and blocks % 2):
            return False
    if (model.kv_heads % tensor and tensor % model.kv_heads) or (asked.sequence and (tensor == 1 or model.context % (tensor * context))):
        return False
    if (stages == 1 and asked.virtual_stages > 1) or batch < replicas:
        return False
    zeros = {"deepspeed": {0, 1, 2, 3} if stages == 1 else set(), "megatron": {0, 1}, "fsdp": {2, 3}, "auto": {0, 1, 2, 3}}
    if asked.zero not in zeros[asked.engine]:
        return False
    fsdp = asked.engine == "fsdp" or (asked.engine == "auto" and stages > 1 and asked.zero > 1)
    if asked.shard is not None and (not fsdp or replicas % asked.shard or (asked.shard == 1 < replicas)):
        return False
    if asked.stage_layers is not None and (len(asked.stage_layers) != chunks or sum(asked.stage_layers) != model.layers):
        return False
    share = math.ceil(batch / replicas)
    return asked.virtual_stages == 1 or math.ceil(share / (asked.micro_batch or share)) >= stages


SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])
LAYOUTS = st.builds(
    ParallelConfig,
    tensor=SIZES,
    pipeline=SIZES,
    virtual_stages=st.sampled_from([1, 2, 3]),
    stage_layers=st.sampled_from([None, None, None, [6], [2, 4], [1, 2, 3], [1, 1, 2, 2]]),
    context=st.sampled_from([1, 1, 2, 3]),
    zero=st.sampled_from([0, 1, 1, 2, 3]),
    engine=st.sampled_from(["auto", "auto", "auto", "deepspeed", "megatron", "fsdp"]),
    shard=st.sampled_from([None, None, None, 1, 2, 3]),
    sequence=st.booleans(),
    micro_batch=st.sampled_from([None, 1, 1, 2, 3, 8]),
)
MODELS = st.builds(
    ModelConfig,
    context=st.sampled_from([64, 36]),
    layers=st.just(6),
    hidden=st.just(48),
    heads=st.just(12),
    key_value_heads=st.sampled_from([None, 1, 2, 4]),
    mlp_hidden=st.sampled_from([None, 66]),
)


@settings(max_examples=150)
@given(MODELS, LAYOUTS, st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24, 64]), st.sampled_from([1, 8, 12, 24]))
def test_any_layout_works_or_is_cured(model: ModelConfig, layout: ParallelConfig, world_size: int, global_batch: int) -> None:
    """Exactly those are accepted that can work; for the others everything that is proposed makes the whole recipe work."""
    training = TrainingConfig(steps=1, global_batch=global_batch)
    recipe = recipes.Recipe(model=model, parallel=layout, training=training)
    if layout_works(recipe, world_size):
        validate(recipe, world_size, "cpu")
        return
    with pytest.raises(RecipeError) as caught:
        validate(recipe, world_size, "cpu")
    assert cures(str(caught.value)), caught.value
    whole = []
    for keys, ranks in cures(str(caught.value)):
        cured = recipe
        for key, value in (item.split("=") for item in keys):
            section, name = key.split(".")
            cured = replace(cured, **{section: replace(getattr(cured, section), **{name: yaml.safe_load(value)})})
        whole.append(layout_works(cured, ranks or world_size))
    assert all(whole), caught.value


def test_thousands_of_ranks_are_searched_at_once(base: Path) -> None:
    """The cure of a large layout with everything wrong is found by trying what can work, not everything."""
    given = ["model.layers=96", "model.heads=96", "model.hidden=12288", "training.global_batch=4096", "parallel.sequence=true"]
    given += ["parallel.tensor=7", "parallel.pipeline=48", "parallel.virtual_stages=4", "parallel.zero=3", "parallel.context=2"]
    message = refused(base, given, world_size=4096)
    for keys, ranks in cures(message):
        validate(recipes.load(base, [*given, *keys]), ranks or 4096, "cpu")
