"""Directories for SGLang and LMDeploy: an independent network with Qwen3's names loads them and decodes our texts as the servers do."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint import store
from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.region import Region
from bd3_scale.costs.parameter_shapes import parameter_shapes
from bd3_scale.data.formats.streaming_compat import prepare_torchvision
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.generation.generate import generate_tokens
from bd3_scale.generation.load_model import load_network
from bd3_scale.rules.validate import validate
from bd3_scale.tuning.interval_tuner import TunerState
from tools import convert_checkpoint

pytestmark = pytest.mark.usefixtures("world_of_one")

MASK, BLOCK, LENGTH, THRESHOLD = 151669, 4, 208, 0.01
SHAPE = ["model.context=208", "model.layers=2", "model.hidden=16", "model.heads=3", "model.key_value_heads=1", "model.head_width=6",
         "model.norm=rmsnorm", "model.mlp=swiglu", "model.mlp_hidden=20", "model.query_key_norm=true", "model.rotary_base=777",
         "objective.block_size=4", "training.steps=5"]  # fmt: skip


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import os

    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))  # where trusted code is copied to
    prepare_torchvision()
    import transformers

    return transformers


def tokenizer(folder: Path) -> str:
    """As many ids as Qwen3's has, so that MASK is the one that the servers know."""
    import tokenizers

    built = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(MASK - 1)} | {"</s>": MASK - 1}, unk_token="w0"))
    built.add_special_tokens([tokenizers.AddedToken("</s>", special=True)])
    built.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def checkpoint(folder: Path, more: Sequence[str] = (), words: str | None = None) -> None:
    """Random weights, large enough that some tokens are sure."""
    recipe_file = folder / "asked.yaml"
    recipe_file.write_text("{}")
    words = words or tokenizer(folder)
    recipe = recipes.load(recipe_file, [*SHAPE, f"data.tokenizer={words}", *more])
    validate(recipe)
    text, generator = load_tokenizer(words), torch.Generator().manual_seed(0)
    fragments = []
    for name, parameter in parameter_shapes(recipe.model, text.model_vocabulary_size).items():
        deviation = 1.0 if name.startswith(("head", "embedding")) else 0.6
        value = torch.randn(parameter.shape, generator=generator) * deviation + ("norm" in name)
        fragments.append(Fragment("weight", name, Region.whole(parameter.shape), value.reshape(-1)))
    known = {"tokenizer": {"name": words, "fingerprint": text.fingerprint}, "data": {"fingerprint": "0"}}
    run = {**known, "tuner": TunerState(4, (0.3, 0.8)).to_dict()}
    store.save(folder / "checkpoints", 5, fragments, samples_consumed=10, run=run, recipe=recipes.to_yaml(recipe))


def convert(*arguments: Any) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def served(model: Any, prompt: list[int], threshold: float) -> list[int]:
    """Block by block, as SGLang's LowConfidence: of what is masked, the surest tokens, at least one in each forward."""
    tokens = torch.tensor(prompt + [MASK] * (LENGTH - len(prompt)))
    blocks = torch.arange(LENGTH) // BLOCK
    hidden = torch.where(blocks[:, None] >= blocks[None, :], 0.0, -torch.inf)[None, None]
    for start in range(0, LENGTH, BLOCK):
        while (masked := tokens[start : start + BLOCK] == MASK).any():
            until = start + BLOCK
            with torch.no_grad():
                logits = model(tokens[None, :until], attention_mask=hidden[..., :until, :until], logits_to_keep=BLOCK).logits[0]
            confidence = torch.where(masked, logits.softmax(-1).amax(-1), -1.0)
            reveal = confidence > threshold
            reveal[confidence.argmax()] = True
            tokens[start:until] = torch.where(masked & reveal, logits.argmax(-1), tokens[start:until])
    return tokens.tolist()


@pytest.mark.parametrize("more", [(), ("model.tied_head=true", "model.attention_bias=all")])
def test_an_independent_network_decodes_the_same_tokens(more: Sequence[str], transformers: Any, tmp_path: Path) -> None:
    checkpoint(tmp_path, more)
    assert convert("export", tmp_path, tmp_path / "out", "--format", "sdar") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    read = transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert {key: getattr(read, key) for key in config if key not in ("auto_map", "torch_dtype")} == {
        key: value for key, value in config.items() if key not in ("auto_map", "torch_dtype")
    }
    theirs = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "auto_map", "torch_dtype")}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**theirs, attn_implementation="eager")).eval()
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    loaded = load_network(tmp_path, device="cpu")
    end = loaded.tokenizer.end_of_text
    ours = generate_tokens(loaded, temperature=0, sampler="confidence", threshold=THRESHOLD, length=LENGTH, stop_at_end_of_text=False)
    expected = ours.tokens[0].tolist()
    assert len(expected) == LENGTH and MASK not in expected and len(set(expected)) >= 5
    assert served(model, [end], THRESHOLD) == expected
    assert ours.nfe < LENGTH - 1 + LENGTH // BLOCK, "some calls reveal several tokens"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == MASK


def test_mask_is_never_the_most_probable(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    assert convert("export", tmp_path, tmp_path / "out", "--format", "sdar") == 0
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    logits = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * 10 @ head.t()
    assert (logits[:, MASK] < logits[:, :MASK].amax(-1)).all()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.query_key_norm=false"], "model.query_key_norm=False does not fit"),
        (["model.norm=layernorm"], "model.norm=layernorm does not fit"),
        (["model.positions=learned"], "model.positions=learned"),
        (["model.conditioning=adaln"], "model.conditioning=adaln"),
        (["objective.clean_half=causal"], "causal clean half"),
        (["objective.kind=mdlm", "objective.block_size=null"], "objective.kind=mdlm"),
    ],
)
def test_what_the_servers_cannot_hold_is_refused(
    more: Sequence[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path, more, words="bytes")
    assert convert("export", tmp_path, tmp_path / "out", "--format", "sdar") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_another_mask_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path, words="bytes")
    assert convert("export", tmp_path, tmp_path / "out", "--format", "sdar") == 2
    assert "MASK is id 257 of data.tokenizer=bytes, but SDAR's servers have 151669" in capsys.readouterr().err


@pytest.mark.parametrize("server", [("sglang", "srt/models/sdar.py"), ("lmdeploy", "pytorch/models/sdar.py")])
def test_every_key_that_a_server_reads_is_there(server: tuple[str, str], tmp_path: Path) -> None:
    package, file = server
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed: its model file cannot be read")
    source = (Path(spec.submodule_search_locations[0]) / file).read_text("utf-8")
    reads = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) in ("config", "self.config")
    }
    checkpoint(tmp_path)
    assert convert("export", tmp_path, tmp_path / "out", "--format", "sdar") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    made_by_the_server = {"dllm_block_length"}
    assert reads and reads - made_by_the_server <= set(config)
    assert config["architectures"][0] in source
