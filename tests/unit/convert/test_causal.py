"""GPT-2, Llama, Qwen, OLMo 2 and Gemma 3 from Hugging Face directories: our network of the imported weights computes their logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.data.formats.streaming_compat import prepare_torchvision
from bd3_scale.generation.load_model import load_network
from bd3_scale.recipe import load
from bd3_scale.rules.validate import validate
from tools import convert_checkpoint

pytestmark = pytest.mark.usefixtures("world_of_one")

IDS, LENGTH = 257, 24
SMALL: dict[str, Any] = {"vocab_size": IDS, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "max_position_embeddings": 32}  # fmt: skip
ODD = {**SMALL, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"vocab_size": IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "layer_norm_epsilon": 1e-4}),
    "gpt2, untied": ("GPT2", {"vocab_size": IDS, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "n_inner": 48,
                              "tie_word_embeddings": False}),
    "llama, grouped": ("Llama", {**SMALL, "num_key_value_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-4}),
    "llama, biases, tied": ("Llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2, padded ids": ("Qwen2", {**SMALL, "vocab_size": IDS + 7, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {**SMALL, "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True}),
    "mistral, window": ("Mistral", {**SMALL, "num_key_value_heads": 1, "sliding_window": 32}),
    "llama 3": ("Llama", {**ODD, "rope_theta": 20.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    "olmo2": ("Olmo2", {**ODD, "tie_word_embeddings": False, "rope_theta": 500.0, "rms_norm_eps": 1e-4}),
    "gemma3": ("Gemma3", {**ODD, "num_hidden_layers": 5, "head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 32,
                          "sliding_window_pattern": 2, "rope_theta": 500.0, "rope_local_base_freq": 20.0,
                          "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "smollm3": ("SmolLM3", {**ODD, "num_hidden_layers": 5, "no_rope_layer_interval": 2, "rope_theta": 500.0, "pad_token_id": 0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers() -> Any:
    prepare_torchvision()
    import transformers

    return transformers


def make(transformers: Any, name: str, folder: Path, **save: Any) -> Any:
    family, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(
        getattr(transformers, f"{family}{'Text' * (family == 'Gemma3')}Config")(**options)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # every parameter drawn, so that every path matters
            parameter.normal_(1.0 if parameter.dim() == 1 and "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder, **save)
    return model


def convert(*arguments: Any) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def causal_logits(run: Path, tokens: Tensor) -> Tensor:
    network = load_network(run, device="cpu").network
    return network.decode(tokens, torch.arange(LENGTH), None, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), last=LENGTH)


@pytest.mark.parametrize("name", MODELS)
def test_causal_logits_are_theirs(name: str, transformers: Any, tmp_path: Path) -> None:
    model = make(transformers, name, tmp_path / "hf", max_shard_size="20KB" if "grouped" in name else "5GB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == ("grouped" in name)
    assert convert("import", tmp_path / "hf", tmp_path / "run", "--tokenizer", "bytes", "--objective", "ar") == 0
    tokens = torch.randint(0, IDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits[..., :IDS]
    found = causal_logits(tmp_path / "run", tokens)
    assert torch.isneginf(found[..., IDS]).all() and found.shape[-1] == IDS + 1
    torch.testing.assert_close(found[..., :IDS], expected, rtol=1e-5, atol=1e-5)
    checkpoint = Checkpoint(tmp_path / "run" / "checkpoints" / "step_00000000")
    checkpoint.verify_files()
    embedding = checkpoint.read("weight", "embedding.weight")
    torch.testing.assert_close(embedding[IDS], embedding[: IDS - 1].mean(0))  # of text, without its end
    recipe = load(tmp_path / "run" / "recipe.yaml")
    validate(recipe)
    assert recipe.objective.kind == "ar" and recipe.model.context == 32


def test_a_run_with_data_trains_from_them(transformers: Any, tmp_path: Path) -> None:
    """One step as block diffusion, continued by the trainer like any run."""
    import numpy as np

    from bd3_scale.data.preparation.packing import Document
    from bd3_scale.data.preparation.prepare import Packing, prepare
    from bd3_scale.data.tokenizer import load_tokenizer
    from bd3_scale.distributed import layout
    from bd3_scale.recipe.schema import ParallelConfig
    from bd3_scale.train import train

    text = load_tokenizer("bytes")
    documents = [Document(str(i), np.array(text.encode("words and words " * 40)), held_out=i == 0) for i in range(3)]
    prepare(tmp_path / "data", Packing(text, 16), "test", None, lambda: documents)
    make(transformers, "gpt2", tmp_path / "hf")
    small = ["model.context=16", "training.steps=1", "training.global_batch=2", "validation.rows=2", "parallel.zero=0",
             "parallel.micro_batch=2", "tracking.progress=false"]  # fmt: skip
    arguments = ["import", tmp_path / "hf", tmp_path / "run", "--tokenizer", "bytes", "--data", tmp_path / "data", "--block-size", 8]
    assert convert(*arguments, "--set", *small) == 0
    assert Checkpoint(tmp_path / "run" / "checkpoints" / "step_00000000").kinds == ("weight", "exp_avg", "exp_avg_sq", "ema")
    train(load(tmp_path / "run" / "recipe.yaml"), layout.current(ParallelConfig(), torch.device("cpu")))
    before, after = (Checkpoint(tmp_path / "run" / "checkpoints" / f"step_0000000{step}") for step in (0, 1))
    change = after.read("weight", "positions.weight") - before.read("weight", "positions.weight")
    assert 0 < change.abs().max() < 1e-2, "it went on from the imported weights"


def test_a_recipe_gives_all_but_the_network(transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped one for fine-tuning; a block size that is asked for beside it stays; another objective is refused."""
    make(transformers, "qwen3", tmp_path / "hf")
    for out, more, block_size in (("run", [], 16), ("small", ["--block-size", 8, "--set", "training.steps=7"], 8)):
        assert convert("import", tmp_path / "hf", tmp_path / out, "--tokenizer", "bytes", "--recipe", "fine_tune", *more) == 0
        found, asked = load(tmp_path / out / "recipe.yaml"), load("fine_tune")
        validate(found)
        assert found.objective.block_size == block_size and found.model.context == asked.model.context
        assert found.model.hidden == 32 != asked.model.hidden and found.data.tokenizer == "bytes"
        assert found.run.dir == str(tmp_path / out) and (found.training.tokens, found.training.steps) in ((50_000_000, None), (None, 7))
        same = ("parallel", "checkpoint", "validation", "tuner", "tracking")
        assert all(getattr(found, section) == getattr(asked, section) for section in same)
        assert found.training.learning_rate == 2e-5
    assert convert("import", tmp_path / "hf", tmp_path / "ar", "--tokenizer", "bytes", "--recipe", "fine_tune", "--objective", "ar") == 2
    assert "objective.kind of fine_tune is bd3, but what is imported goes on as ar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama, grouped", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no rope_scaling.low_freq_factor"),
        ("qwen2, padded ids", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ("qwen2, padded ids", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ("smollm3", {"no_rope_layers": [1, 0, 0, 1, 1]}, "no_rope_layers = [1, 0, 0, 1, 1]"),
        ("gemma3", {"layer_types": ["full_attention", *["sliding_attention"] * 4]}, "layer_types = ['full_attention', 'sliding_"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_theta": 500.0}}}, "no rope_parameters.sliding_attention"),
        (
            "gemma3",
            {"rope_parameters": {kind: {"rope_type": "linear", "factor": 8.0} for kind in ("full_attention", "sliding_attention")}},
            "rope_parameters.sliding_attention = {'rope_type': 'linear'",
        ),
        ("llama, grouped", {"model_type": "gemma2"}, "gemma2 caps its logits (attn_logit_softcapping"),
        ("llama, grouped", {"model_type": "olmo3"}, "olmo3 has layers that differ in window"),
        ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu'"),
        ("gpt2", {"n_layer": 1}, "h.1."),
        ("gpt2", {"n_layer": 3}, "h.2.attn.c_attn.bias is missing"),
        ("llama, grouped", {"model_type": "mamba"}, "'mamba'"),
        ("llama, grouped", {"num_key_value_heads": 4}, "key_value.weight would be [32, 32], made of model.layers.0.self_attn.k_proj"),
        ("llama, grouped", {"num_attention_heads": "six"}, "has a value that is none of its key (invalid literal for int()"),
        ("llama, grouped", {"rope_scaling": {"rope_type": "linear", "factor": [2]}}, "has a value that is none of its key (float()"),
        ("llama, grouped", {"rope_scaling": [1, 2]}, "rope_scaling = [1, 2]"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        ("gemma3", {"rope_parameters": {"rope_theta": 500.0}}, "no rope_parameters.full_attention"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, change: dict[str, Any], said: str, transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(transformers, name, tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    assert convert("import", tmp_path / "hf", tmp_path / "run", "--tokenizer", "bytes") == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(("name", "change"), [
    ("qwen2, padded ids", {"use_sliding_window": True}), ("mistral, window", {}), ("gemma3", {"layer_types": None})
])  # fmt: skip
def test_rows_are_not_longer_than_a_sliding_window(
    name: str, change: dict[str, Any], transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(transformers, name, tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change, "sliding_window": 8}))
    common = ["import", tmp_path / "hf", tmp_path / "run", "--tokenizer", "bytes"]
    assert convert(*common, "--set", "model.context=16") == 2
    assert "do rows of 8 tokens" in capsys.readouterr().err
    assert convert(*common) == 0 and load(tmp_path / "run" / "recipe.yaml").model.context == 8


def test_deepspeed_universal_is_the_same_and_zero_shards_are_refused(
    transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ds_to_universal writes it: {"param": whole tensor} for each of named_parameters()."""
    model = make(transformers, "qwen3", tmp_path / "hf")
    for name, parameter in model.named_parameters():
        (tmp_path / "universal" / "zero" / name).mkdir(parents=True)
        torch.save({"param": parameter.detach(), "cat_dim": 0}, tmp_path / "universal" / "zero" / name / "fp32.pt")
        torch.save({"param": torch.zeros_like(parameter)}, tmp_path / "universal" / "zero" / name / "exp_avg.pt")
    common = ["--tokenizer", "bytes", "--objective", "ar"]
    assert convert("import", tmp_path / "universal", tmp_path / "a", *common) == 1
    assert "--config" in capsys.readouterr().err
    assert convert("import", tmp_path / "universal", tmp_path / "a", *common, "--config", tmp_path / "hf" / "config.json") == 0
    assert convert("import", tmp_path / "hf", tmp_path / "b", *common) == 0
    one, other = (Checkpoint(tmp_path / run / "checkpoints" / "step_00000000") for run in "ab")
    assert all(torch.equal(value, other.read("weight", name)) for name, value in one.weights())
    (tmp_path / "zero1" / "global_step5").mkdir(parents=True)
    (tmp_path / "zero1" / "global_step5" / "mp_rank_00_model_states.pt").touch()
    assert convert("import", tmp_path / "zero1", tmp_path / "c", *common) == 1
    assert "zero_to_fp32.py" in capsys.readouterr().err


def test_bad_keys_and_places_are_refused(transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(transformers, "gpt2", tmp_path / "hf")
    common = ["import", tmp_path / "hf", tmp_path / "run", "--tokenizer", "bytes"]
    assert convert(*common, "--set", "model.hidden=64") == 2
    assert convert(*common, "--set", "model.context=64") == 2
    assert convert(*common, "--block-size", "5") == 2
    assert convert("import", tmp_path / "hf", tmp_path / "run") == 1, "no tokenizer"
    assert convert("import", tmp_path / "hf", tmp_path / "run", "--tokenizer", "gpt2") == 1, "of another model"
    assert convert("import", tmp_path / "hf", tmp_path / "hf", "--tokenizer", "bytes") == 1, "not empty"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6 and all(line.startswith("bd3 convert: error: ") for line in said)
    assert not list(tmp_path.glob("run/*"))
