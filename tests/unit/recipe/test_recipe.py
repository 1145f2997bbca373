"""Recipes: what cannot work is refused in one line that names the key and the cure, before anything is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bd3_scale import recipe as recipes
from bd3_scale import train
from bd3_scale.errors import RecipeError
from bd3_scale.recipe.definition import KEYS
from bd3_scale.recipe.schema import SourceConfig
from bd3_scale.rules.validate import validate
from tests.unit.refusing import BASE, refused


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.hiden=3", "model.hiden"),
        ("modle.hidden=3", "modle"),
        ("model.hidden=wide", "model.hidden"),
        ("model.hidden=1e3", "model.hidden"),
        ("model.hidden=-32", "model.hidden"),
        ("model.heads=5", "set model.heads=4"),
        ("model.heads=32", "model.heads"),
        ("model.key_value_heads=3", "set model.key_value_heads=2"),
        ("model.norm=batchnorm", "set one of layernorm, rmsnorm"),
        ("model.attention=flex", "set model.attention=auto"),
        ("objective.block_size=7", "objective.block_size"),
        ("objective.kind=gan", "objective.kind"),
        ("objective.kind=ar", "objective.block_size"),
        ("objective.interval=[0.9,0.2]", "objective.interval"),
        ("objective.draws=0", "objective.draws is 0 but must be above 0"),
        ("objective.draws=3", "objective.draws = 3 makes 3 of each row of data; set"),
        ("objective.pairs=complement", "set objective.draws=2"),
        ("tuner.margin=2", "tuner.margin"),
        ("objective.density=learned", "set tuner.enabled=true tuner.kind=density"),
        ("tracking.control_variate=true", "set tuner.enabled=true or tracking.control_variate=false"),
        ("tuner.kind=both", "set tuner.enabled=true or tuner.kind=interval"),
        ("objective.density_shape=[2]", "a uniform density has none; set objective.density_shape=null"),
        ("training.tokens=5", "training.tokens"),
        ("training.steps=null", "set training.steps"),
        ("training.betas=[0.9,1.5]", "training.betas"),
        ("training.betas=[0.9]", "training.betas is [0.9] but must be 2 numbers"),
        ("training.betas=[0.9,high]", "training.betas is [0.9,high] but must be 2 numbers"),
        ("training.betas=0.9", "training.betas is 0.9 but must be 2 numbers"),
        (
            "training.recompute=true",
            "training.recompute is true but is one of none, attention, mlp, layer; set training.recompute=layer",
        ),
        ("training.compile=true", "set training.compile=blocks for what true was"),
        ("training.compile=false", "set training.compile=none for what false was"),
        ("training.compile=reduce-overhead", "set one of none, blocks, max-autotune"),
        ("training.compile=max-autotune", "needs CUDA because it chooses among GPU kernels by timing them; set training.compile=none"),
        ("model.attention=flex_flash", "needs CUDA because FlexAttention has no backward on CPU; set model.attention=auto"),
        ("training.recompute=half", "set one of none, attention, mlp, layer"),
        ("training.precision=fp16", "bf16 needs no loss scaling; set training.precision=bf16"),
        ("model=3", "model is 3 but is a section"),
        ("model=[1]", "model is [1] but is a section"),
        ("model=null", "model is null but is a section"),
        ("training.ema=1.0", "training.ema"),
        ("parallel.tensor=2", "start 2 ranks, or set parallel.tensor=1"),
        ("parallel.pipeline=2", "start 2 ranks, or set parallel.pipeline=1"),
        ("parallel.zero=4", "set one of 0, 1, 2, 3"),
        ("run.resume=perhaps", "set one of auto, never, fresh"),
        ("--training.steps=3", "without dashes"),
        ("verbose", "dotted.key=value"),
    ],
)
def test_refused_in_one_line_that_names_the_key(base: Path, override: str, named: str) -> None:
    assert named in refused(base, [override])


def test_any_world_that_has_a_row_for_each_replica_shares_the_global_batch(base: Path) -> None:
    for world_size in range(1, 9):
        validate(recipes.load(base), world_size, device="cpu")
    assert "training.global_batch = 8 must be at least the data-parallel ranks = 9" in refused(base, [], world_size=9)


def test_micro_batch_null_is_the_whole_share(base: Path) -> None:
    recipe = recipes.load(base, ["parallel.micro_batch=null"])
    validate(recipe, 4, "cpu")
    assert [recipe.micro_batch(replicas) for replicas in (1, 2, 3, 4, 5)] == [8, 4, 3, 2, 2]
    assert "training.global_batch" in refused(base, ["parallel.micro_batch=null"], world_size=16)


def test_bf16_without_a_master_copy_is_refused(base: Path) -> None:
    assert "set parallel.zero=1" in refused(base, ["parallel.zero=0", "training.precision=bf16"])


def test_resolved_recipe_reads_back_as_the_same(base: Path, tmp_path: Path) -> None:
    recipe = recipes.load(base, ["objective.block_size=[[0,64],[10,8]]", "run.name=again", "training.learning_rate=1e-4"])
    (tmp_path / "again.yaml").write_text(recipes.to_yaml(recipe))
    assert recipes.load(tmp_path / "again.yaml") == recipe
    assert recipe.run.dir == "runs/again"


def test_steps_from_tokens_are_rounded_up(base: Path) -> None:
    recipe = recipes.load(base, ["training.steps=null", "training.tokens=1025"])
    assert recipe.tokens_before(1) == 512 and recipe.total_steps == 3


@pytest.mark.parametrize("text", ["model: [", "- 1\n- 2", "model: 3"])
def test_bad_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    refused(path, [])


def test_missing_recipe_and_folder(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none.yaml", [])
    assert "folder" in refused(tmp_path, [])


def test_continuing_another_run_names_the_key(base: Path) -> None:
    saved = recipes.load(base)
    recipes.compare(saved, recipes.load(base, ["training.steps=40", "parallel.zero=3", "tracking.every=1", "run.dir=x"]), 10)
    for override in ("model.hidden=64", "run.seed=1", "training.global_batch=16", "data.row_special=none", "training.learning_rate=1"):
        with pytest.raises(RecipeError, match=override.split("=")[0]):
            recipes.compare(saved, recipes.load(base, [override]), 10)


def test_a_named_key_may_be_amended_and_no_other(base: Path) -> None:
    saved = recipes.load(base)
    changed = ["training.learning_rate=1", "training.clip=3", "run.amend=[training.learning_rate]"]
    with pytest.raises(RecipeError, match=r"^training.clip is 3.0 .* or run.amend=\[training.clip\] to change it from step 10 on$"):
        recipes.compare(saved, recipes.load(base, changed), 10)
    changed[-1] = "run.amend=[training.learning_rate,training.clip,run.seed]"
    before = saved.training
    assert recipes.compare(saved, recipes.load(base, changed), 10) == {
        "training.learning_rate": (before.learning_rate, 1.0),
        "training.clip": (before.clip, 3.0),
    }
    with pytest.raises(RecipeError, match=r"but the run being continued has 1.0 since step 10, and it defines the run; set"):
        recipes.compare(recipes.load(base, changed), saved, 20, {"training.learning_rate": 10})
    with pytest.raises(RecipeError) as refusal:
        recipes.compare(saved, recipes.load(base, ["model.hidden=64"]), 10)
    assert "amend" not in str(refusal.value)
    assert refused(base, ["run.amend=[model.hidden]"]).startswith("run.amend has 'model.hidden', which no continued run can change")


def test_block_sizes_of_the_future_may_change_those_of_the_past_not(base: Path) -> None:
    saved = recipes.load(base)
    later = replace(saved, objective=replace(saved.objective, block_size=[[0, 8], [10, 4]]))
    recipes.compare(saved, later, 10)
    with pytest.raises(RecipeError, match="block_size"):
        recipes.compare(saved, later, 11)


def test_batches_of_the_future_may_change_those_of_the_past_not(base: Path) -> None:
    """Also by a ramp that is another one on paper and came to the same updates; what is refused says what the run has."""
    saved, early = recipes.load(base), recipes.load(base, ["training.global_batch=[[0,4],[16,8]]"])
    later = recipes.load(base, ["training.global_batch=[[0,8],[77,16],[200,32]]"])
    recipes.compare(saved, later, 10)
    recipes.compare(later, recipes.load(base, ["training.global_batch=[[0,8],[80,16],[300,64]]"]), 17)
    with pytest.raises(
        RecipeError, match=r"^training.global_batch is \[\[0, 8\].* but the run being continued has 8, and it defines the run"
    ):
        recipes.compare(saved, later, 11)
    for step in (1, 10):
        with pytest.raises(RecipeError, match=r"set training.global_batch=\[\[0, 4\], \[16, 8\]\]"):
            recipes.compare(early, saved, step)


def test_a_budget_of_tokens_ends_with_the_update_that_reaches_it(base: Path) -> None:
    recipe = recipes.load(base, ["training.steps=null", "training.tokens=2048", "training.global_batch=[[0,4],[8,8]]"])
    assert (recipe.tokens_before(2), recipe.tokens_before(5), recipe.total_steps) == (512, 2048, 5)
    recipe.training.tokens = 2049
    assert recipe.total_steps == 6


def test_a_batch_may_come_from_the_environment(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH", "16")
    assert recipes.load(base, ["training.global_batch=${oc.env:BATCH}"]).training.global_batch == 16


def test_command_prints_one_line_and_leaves_with_two(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(base), "model.hiden=3"]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and printed[0].startswith("bd3_scale: error: model.hiden")


# -- The tables of rules, row by row -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "allowed"), [(key, facts.choices) for key, facts in KEYS.items() if facts.choices])
def test_every_choice_is_accepted_and_nothing_else(base: Path, key: str, allowed: tuple[Any, ...]) -> None:
    for value in allowed:
        needed = {"fsdp": ["parallel.zero=2"], "wsd": ["training.decay=5", "training.warmup=0"]}
        needed |= {kind: ["tuner.enabled=true"] for kind in ("density", "both")}
        needed |= {pairs: ["objective.draws=2"] for pairs in ("complement", "antithetic")}
        needed |= {"heads": ["model.query_key_norm=true"]}
        validate(recipes.load(base, [f"{key}={'null' if value is None else value}", *needed.get(str(value), [])]))
    message = refused(base, [f"{key}={7 if isinstance(allowed[0], int) else 'other'}"])
    assert message.startswith(f"{key} is ") and all(str(value) in message for value in allowed)


@pytest.mark.parametrize("key", [key for key, facts in KEYS.items() if (facts.above, facts.least) != (None, None)])
def test_every_bound_holds_and_is_named(base: Path, key: str) -> None:
    bounds = ["-1", "0"] if KEYS[key].above == 0 else ["-1"]
    for value in bounds:
        assert refused(base, [f"{key}={value}"]).startswith(f"{key} is {value}")
    if KEYS[key].least == 0:
        validate(recipes.load(base, [f"{key}=0"]))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("model: {hiden: 3}", "model.hiden"),
        ("modle: {hidden: 3}", "modle"),
        ("model: {hidden: wide}", "model.hidden"),
        ("model: {hidden: 2.5}", "model.hidden"),
        ("model: {hidden: [1]}", "model.hidden"),
        ("model: {hidden: null}", "model.hidden"),
        ("model: {tied_head: perhaps}", "model.tied_head"),
        ("training: {learning_rate: fast}", "training.learning_rate"),
        ("model:", "model is null but is a section"),
        ("objective: {interval: [0.1, 0.2, 0.3]}", "objective.interval is [0.1,0.2,0.3] but must be 2 numbers"),
        ("objective: {interval: 0.3}", "objective.interval"),
        ("run: {dir: '${run.nmae}'}", "run.dir"),
    ],
)
def test_recipe_with_an_unknown_key_or_a_wrong_type(tmp_path: Path, line: str, named: str) -> None:
    (tmp_path / "bad.yaml").write_text(f"{line}\n")
    assert named in refused(tmp_path / "bad.yaml", [])


def test_only_true_and_false_are_booleans(base: Path) -> None:
    """OmegaConf takes 3 for true and "no" in quotes for false; what is resolved from another key is seen only afterwards."""
    switches = [key for key, value in recipes.flatten(recipes.load(base)).items() if isinstance(value, bool)]
    assert "parallel.sequence" in switches and "tuner.enabled" in switches
    for key in switches:
        for value in ("3", "0", "1.0", "'no'", "null", "[true]"):
            message = refused(base, [f"{key}={value}"])
            assert message.startswith(f"{key} is ") and message.endswith(f"set {key}=true, or set {key}=false")
    assert recipes.load(base, ["model.tied_head=true", "model.head_bias=${model.tied_head}"]).model.head_bias is True


def test_numbers_are_finite(base: Path) -> None:
    for key, value in recipes.flatten(recipes.load(base)).items():
        if isinstance(value, float):
            for wrong in ("inf", ".nan"):
                assert refused(base, [f"{key}={wrong}"]).startswith(f"{key} is {wrong.strip('.')} but must be finite; set {key}={value}")
        elif isinstance(value, tuple):
            assert refused(base, [f"{key}=[0.5,.nan]"]).startswith(f"{key} is [0.5,nan] but must be finite")


def test_unknown_key_is_answered_with_the_one_that_was_meant(base: Path) -> None:
    assert "'hidden'" in refused(base, ["model.hiden=3"])
    assert "'micro_batch'" in refused(base, ["parallel.microbatch=3"])
    assert "'model'" in refused(base, ["modle.hidden=3"])


def test_overrides_come_last_and_are_typed(base: Path) -> None:
    recipe = recipes.load(
        base,
        [
            "model.hidden=64",
            "model.hidden=48",
            "training.learning_rate=1e-4",
            "training.betas=[0.8, 0.9]",
            "model.key_value_heads=null",
            "model.tied_head=true",
            "run.name=a=b",
        ],
    )
    assert recipe.model.hidden == 48 and recipe.model.layers == 2 and recipe.model.tied_head is True
    assert recipe.training.learning_rate == 1e-4 and list(recipe.training.betas) == [0.8, 0.9]
    assert recipe.model.key_value_heads is None and recipe.run.name == "a=b"
    for wrong in ("=3", "model.hidden", "-model.hidden=3", ""):
        assert "dotted.key=value" in refused(base, [wrong])


# -- Continuing --------------------------------------------------------------------------------------------------------


def test_every_key_either_may_change_or_is_named(base: Path) -> None:
    """The layout, the micro-batch, where things lie and what is written down may; what makes the run may not."""
    saved = recipes.load(base)
    free = set()
    for key in recipes.flatten(saved):
        section, name = key.split(".")
        special = {"objective.block_size": 16, "objective.draws": 2, "data.mixture": [SourceConfig(path="a")]}
        other = special.get(key, "something else")
        changed = replace(saved, **{section: replace(getattr(saved, section), **{name: other})})
        try:
            recipes.compare(saved, changed, 10)
            free.add(key)
        except RecipeError as error:
            assert str(error).startswith(f"{key} is ") and "\n" not in str(error)
    may = {"training.steps", "training.tokens", "training.recompute", "training.compile", "run.dir", "data.path", "data.remote"}
    assert may <= free and {key for key in recipes.flatten(saved) if key.split(".")[0] in ("parallel", "checkpoint", "tracking")} <= free
    may_not = ("objective", "tuner", "model")
    assert {key for key in free if key.split(".")[0] in may_not} == {"model.attention", "model.head_loss"}, "kernels change no result"
    assert not free & {"run.seed", "training.global_batch", "data.skip", "data.row_special", "data.window", "validation.rows"}
    assert "data.mixture" not in free


def test_a_saved_recipe_of_an_earlier_version_is_read_as_what_it_meant(base: Path) -> None:
    base.write_text(BASE.replace("steps: 20", "steps: 20, recompute: true, compile: true"))
    assert recipes.load(base, saved=True).training.recompute == "layer" and recipes.load(base, saved=True).training.compile == "blocks"
    base.write_text(BASE.replace("steps: 20", "steps: 20, recompute: false, compile: false"))
    assert recipes.load(base, saved=True) == recipes.load(_plain(base))
    for facts in KEYS.values():
        assert set(facts.former) in (set(), {True, False}) and set(facts.former.values()) <= {*facts.choices}


def _plain(base: Path) -> Path:
    path = base.with_name("plain.yaml")
    path.write_text(BASE)
    return path


MIXTURE = "data.mixture=[{path: a, weight: 0.7}, {path: b, weight: 0.3, remote: s3://b, format: webdataset}]"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([MIXTURE.replace("0.7", "0.5")], "must sum up to 1, with at most 4 decimals each; set them to 0.625, 0.375"),
        ([MIXTURE.replace("0.7", "2").replace("0.3", "1")], "set them to 0.6667, 0.3333"),
        ([MIXTURE.replace("0.7", "0.66666").replace("0.3", "0.33334")], "at most 4 decimals each; set them to 0.6667, 0.3333"),
        ([MIXTURE.replace("0.7", "1.3").replace("0.3", "-0.3")], "must all be above 0"),
        ([MIXTURE.replace("0.7", ".nan")], "must all be above 0"),
        ([MIXTURE.replace("path: b", "path: a")], "each source must have one of its own"),
        ([MIXTURE.replace("path: a, ", "")], "each source must have one of its own"),
        ([MIXTURE.replace("webdataset", "parquet")], "set each to one of mds, webdataset"),
        (
            [MIXTURE, "data.format=webdataset"],
            "data.format must not be set because data.mixture says where the data lie",
        ),
        (["data.cache_bytes=1000"], "bounds the local copy of a remote, but data.remote is null; set data.cache_bytes=null"),
    ],
)
def test_a_mixture_or_cache_that_cannot_work_is_refused(base: Path, overrides: list[str], said: str) -> None:
    plain = ["data.path=~/.cache/bd3_scale/data", "data.source=null"]
    assert said in refused(base, plain + overrides)
    validate(recipes.load(base, [*plain, MIXTURE, "data.cache_bytes=1000"]))


def test_a_mixture_may_move_but_not_change(base: Path) -> None:
    saved = recipes.load(base, [MIXTURE])
    moved = recipes.load(base, [MIXTURE.replace("path: a", "path: elsewhere").replace("s3", "gs")])
    recipes.compare(saved, moved, 10)
    assert moved.data.mixture[0].path == "elsewhere"
    with pytest.raises(RecipeError, match=r"^data.mixture is \[0\.3, 0\.7\] but the run being continued has \[0\.7, 0\.3\]"):
        recipes.compare(saved, recipes.load(base, ["data.mixture=[{path: b, weight: 0.3}, {path: a, weight: 0.7}]"]), 10)
