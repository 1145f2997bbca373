"""Exports: the same bits after a round trip, the same logits in transformers, texts, and the same ids from its tokenizer."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint import store
from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.checkpoint.region import Region
from bd3_scale.costs.parameter_shapes import parameter_shapes
from bd3_scale.data.formats.streaming_compat import prepare_torchvision
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.errors import RecipeError
from bd3_scale.generation.load_model import load_network
from bd3_scale.objectives.table import ObjectiveSchedule
from bd3_scale.rules.validate import validate
from bd3_scale.tuning.interval_tuner import TunerState
from tools import convert_checkpoint

pytestmark = pytest.mark.usefixtures("world_of_one")

LENGTH, MASK = 16, 257
SMALL = ["model.context=16", "model.layers=2", "model.hidden=32", "model.heads=4", "data.tokenizer=bytes", "training.steps=5"]
NETWORKS: dict[str, list[str]] = {
    "plain": ["objective.block_size=4", "model.dropout=0.1"],
    "adaln, causal clean half": ["model.conditioning=adaln", "model.mlp_bias=true", "model.head_bias=true", "objective.clean_half=causal"],
    "llama": ["model.norm=rmsnorm", "model.mlp=swiglu", "model.key_value_heads=2", "model.tied_head=true", "model.query_key_norm=true",
              "model.head_width=12", "model.rotary_scaling=[8,1,4,9]", "model.unrotated_every=2",
              "objective.block_size=[[0,16],[2,8],[9,2]]"],
    "gpt2, ar": ["model.positions=learned", "model.attention_bias=all", "model.norm_bias=true", "objective.kind=ar", "model.tied_head=true",
                 "model.head_bias=true"],
    "mdlm": ["objective.kind=mdlm"],
    "olmo2": ["model.norm=rmsnorm", "model.mlp=swiglu", "model.key_value_heads=2", "model.query_key_norm=true",
              "model.query_key_norm_width=heads", "model.norm_place=after", "objective.block_size=4"],
    "gemma3": ["model.norm=rmsnorm", "model.mlp=geglu", "model.key_value_heads=2", "model.query_key_norm=true", "model.norm_place=both",
               "model.rotary_local=[50,2]", "model.rotary_scaling=[8,1,2,1]", "model.tied_head=true", "objective.block_size=4"],
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import os

    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))  # where trusted code is copied to
    prepare_torchvision()
    import transformers

    return transformers


def checkpoint_of(folder: Path, name: str, more: Sequence[str] = ()) -> Path:
    """A checkpoint of random weights and other averages, after 5 steps."""
    recipe_file = folder / "asked.yaml"
    recipe_file.write_text("{}")
    recipe = recipes.load(recipe_file, [*SMALL, *NETWORKS[name], *more])
    validate(recipe)
    generator = torch.Generator().manual_seed(0)
    fragments = []
    for kind in ("weight", "ema"):
        for name, parameter in parameter_shapes(recipe.model, MASK + 1).items():
            value = torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name)
            fragments.append(Fragment(kind, name, Region.whole(parameter.shape), value.reshape(-1)))
    run = {
        "tuner": TunerState(8, (0.3, 0.8)).to_dict(),
        "tokenizer": {"name": "bytes", "fingerprint": load_tokenizer("bytes").fingerprint},
        "data": {"fingerprint": "0"},
    }
    return store.save(folder / "checkpoints", 5, fragments, samples_consumed=10, run=run, recipe=recipes.to_yaml(recipe))


def convert(*arguments: Any) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("form", ["directory", "one file"])
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_keeps_every_bit_and_what_it_is_for(name: str, form: str, tmp_path: Path) -> None:
    before = Checkpoint(checkpoint_of(tmp_path, name))
    out = tmp_path / ("out" if form == "directory" else "out.safetensors")
    assert convert("export", tmp_path, out) == 0
    assert convert("import", out, tmp_path / "back") == 0
    loaded = load_network(tmp_path / "back", device="cpu")
    after = loaded.checkpoint
    assert after.shapes("weight") == before.shapes("ema")
    for parameter in after.shapes("weight"):
        assert torch.equal(after.read("weight", parameter), before.read("ema", parameter)), parameter
    whole = load_network(tmp_path, device="cpu")
    assert (loaded.objective.kind, loaded.objective.block_size) == (whole.objective.kind, whole.objective.block_size)
    assert loaded.recipe.model == whole.recipe.model and after.run["tuner"]["interval"] == [0.3, 0.8]
    assert not [path.name for path in tmp_path.iterdir() if "tmp" in path.name]


@pytest.mark.parametrize("name", NETWORKS)
def test_transformers_computes_the_same_logits_and_writes_texts(name: str, transformers: Any, tmp_path: Path) -> None:
    checkpoint_of(tmp_path, name)
    assert convert("export", tmp_path, tmp_path / f"hf_{list(NETWORKS).index(name)}", "--weights", "weight") == 0
    folder = next(tmp_path.glob("hf_*"))
    model, report = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    model.eval()
    loaded = load_network(tmp_path, weights="weight", device="cpu")
    data = np.random.default_rng(0).integers(0, MASK, (2, LENGTH))
    objective = ObjectiveSchedule(loaded.recipe.objective, LENGTH, MASK).at(0) if loaded.objective.kind != "bd3" else loaded.objective
    given = objective.training_inputs(data, np.arange(2), 0, 0, 2)
    seen: list[Tensor] = []
    hook = loaded.network.head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        loaded.network(given)
        hook.remove()
        expected = loaded.network.head(seen[0])
        noisy = given.tokens[:, :LENGTH]
        clean = {"clean_ids": torch.from_numpy(data)} if given.pattern.kind == "block_diffusion" else {}
        found = model(noisy, **clean).logits.flatten(0, 1)[given.selected]
    assert torch.isneginf(found[:, MASK]).all()
    torch.testing.assert_close(found[:, :MASK], expected[:, :MASK], rtol=1e-6, atol=1e-6)
    text = model.generate(torch.tensor([[256, 72, 105, 33, 32, 65]] * 2), generator=torch.Generator().manual_seed(0), stop_at_end=False)
    assert text.shape == (2, LENGTH) and (text < MASK).all() and text[:, :6].tolist() == [[256, 72, 105, 33, 32, 65]] * 2
    assert not torch.equal(text[0], text[1])


@pytest.mark.parametrize("name", ["plain", "adaln, causal clean half", "llama", "gpt2, ar"])
def test_greedy_texts_are_those_of_our_sampler(name: str, transformers: Any, tmp_path: Path) -> None:
    """With blocks of one token (and `ar`) the order is fixed, and the most probable token is the same to both."""
    NETWORKS["greedy"] = [key for key in NETWORKS[name] if "block_size" not in key] + (["objective.block_size=1"] * (name != "gpt2, ar"))
    checkpoint_of(tmp_path, "greedy")
    del NETWORKS["greedy"]
    assert convert("export", tmp_path, tmp_path / "greedy") == 0
    model = transformers.AutoModel.from_pretrained(tmp_path / "greedy", trust_remote_code=True).eval()
    from bd3_scale.generation.generate import generate_tokens

    result = generate_tokens(load_network(tmp_path, device="cpu"), prompts=["Hi", "So"], temperature=0, stop_at_end_of_text=False)
    prompts = torch.tensor([[256, *text.encode()] for text in ("Hi", "So")])
    found = model.generate(prompts, temperature=0, stop_at_end=False)
    assert found.tolist() == [row.tolist() for row in result.tokens]


def test_modelling_code_needs_torch_and_transformers_only() -> None:
    from bd3_scale.convert.export import CODE, HUB

    for name in CODE:
        for node in ast.walk(ast.parse((HUB / name).read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""] if node.level == 0 else []
                assert node.level == 0 or node.module == "configuration_bd3"
            assert {module.split(".")[0] for module in modules} <= {"torch", "transformers", "math", "typing"}


def test_text_ends_where_the_end_is_drawn(transformers: Any, tmp_path: Path) -> None:
    checkpoint_of(tmp_path, "plain")
    assert convert("export", tmp_path, tmp_path / "ends") == 0
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ends", trust_remote_code=True).eval()
    free = model.generate(temperature=0, batch_size=2, generator=torch.Generator().manual_seed(1), stop_at_end=False)
    model.config.eos_token_id = int(free[0, 7])
    ended = model.generate(temperature=0, batch_size=2, generator=torch.Generator().manual_seed(1))
    first = [int((row[1:] == model.config.eos_token_id).nonzero()[0]) + 1 for row in free[:1]]
    assert torch.equal(ended[0, : first[0]], free[0, : first[0]]) and (ended[0, first[0] :] == model.config.eos_token_id).all()


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_tokenizer_files_give_our_ids(name: str, transformers: Any, tmp_path: Path) -> None:
    from bd3_scale.data.tokenizer_files import write_tokenizer

    ours = load_tokenizer(name)
    write_tokenizer(ours, tmp_path, 16)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello  world, it's 12:30\n\tdef f(x): return x", "Größe 日本語 😀", " leading", "tail  "):
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.mask_token_id, theirs.eos_token_id, len(theirs)) == (ours.mask_id, ours.end_of_text, ours.model_vocabulary_size)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_an_exported_model_says_nothing_of_copies(out: str, tmp_path: Path) -> None:
    """A URL may hold credentials, and an exported model is made to be given away."""
    copies = [f"{key}=s3://secret@bucket/{key}" for key in ("data.remote", "checkpoint.remote")]
    assert b"secret" in (checkpoint_of(tmp_path, "plain", copies) / "recipe.yaml").read_bytes()
    assert convert("export", tmp_path, tmp_path / out) == 0
    files = [path for path in (tmp_path / out, *(tmp_path / out).rglob("*")) if path.is_file()]
    assert files and not [path for path in files if b"secret" in path.read_bytes()]


def test_nothing_is_overwritten_and_damage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_of(tmp_path, "plain")
    assert convert("export", tmp_path, tmp_path / "a.safetensors") == 0
    assert convert("export", tmp_path, tmp_path / "a.safetensors") == 1
    assert "exists" in capsys.readouterr().err
    whole = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    assert "__metadata__" in header
    for damaged, said in ((whole[:-5], "inside the file"), (whole[:100], "not a safetensors"), (b"\0" * 64, "not a safetensors")):
        (tmp_path / "b.safetensors").write_bytes(damaged)
        assert convert("import", tmp_path / "b.safetensors", tmp_path / "back") == 1
        assert said in capsys.readouterr().err and not (tmp_path / "back").exists()


def test_a_mixture_of_block_sizes_is_sampled_and_exported_with_any_of_them(tmp_path: Path) -> None:
    """By itself with the one of the largest share."""
    NETWORKS["mixture"] = ["objective.block_size={2: 0.3, 8: 0.5, 16: 0.2}"]
    checkpoint_of(tmp_path, "mixture")
    del NETWORKS["mixture"]
    assert [load_network(tmp_path, device="cpu", block_size=size).objective.block_size for size in (None, 2, 8, 16)] == [8, 2, 8, 16]
    with pytest.raises(RecipeError, match=r"the block size is 4, but .* was trained with 2 or 8 or 16"):
        load_network(tmp_path, device="cpu", block_size=4)
    assert convert("export", tmp_path, tmp_path / "out") == 0 and convert("import", tmp_path / "out", tmp_path / "back") == 0
    assert load_network(tmp_path / "back", device="cpu").recipe.objective.block_size == {2: 0.3, 8: 0.5, 16: 0.2}
