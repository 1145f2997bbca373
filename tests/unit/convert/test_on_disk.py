"""Models as they lie on disks: links, leftovers, quantised or adapted weights, tokenizers with holes and ends of text of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.data.formats.streaming_compat import prepare_torchvision
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.recipe import load
from tools import convert_checkpoint

pytestmark = pytest.mark.usefixtures("world_of_one")
END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
"""As DeepSeek calls it."""


@pytest.fixture(scope="module")
def transformers() -> Any:
    prepare_torchvision()
    import transformers

    return transformers


def gradient_norms(source: Path, out: Path) -> list[float]:
    """Of the first 50 steps of block diffusion at high mask rates, which begin with the weights of `source`."""
    import numpy as np

    from bd3_scale.data.preparation.packing import Document
    from bd3_scale.data.preparation.prepare import Packing, prepare
    from bd3_scale.distributed import layout
    from bd3_scale.recipe.schema import ParallelConfig
    from bd3_scale.train import train

    text = load_tokenizer(str(source / "tokenizer.json"))
    words = np.random.Generator(np.random.Philox(0)).integers(0, 10, (3, 800))
    prepare(out / "data", Packing(text, 16), "test", None, lambda: [Document(str(i), words[i], held_out=i == 0) for i in range(3)])
    small = ["model.context=16", "training.steps=50", "training.global_batch=8", "training.warmup=0", "training.learning_rate=1e-3",
             "objective.interval=[0.9,1.0]", "validation.rows=2", "parallel.zero=0", "parallel.micro_batch=8", "tracking.every=1",
             "tracking.progress=false"]  # fmt: skip
    arguments = ["import", source, out / "run", "--data", out / "data", "--block-size", 8, "--set", *small]
    assert convert(*arguments) == 0
    train(load(out / "run" / "recipe.yaml"), layout.current(ParallelConfig(), torch.device("cpu")))
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["gradient_norm"] for line in lines if "gradient_norm" in line]


@pytest.fixture
def model(transformers: Any, tmp_path: Path) -> Path:
    """A tiny Llama of 401 ids."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=401, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                      max_position_embeddings=32, rope_theta=500.0)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    for file in ("config.json", "generation_config.json"):
        changed(tmp_path / "hf" / file, eos_token_id=None)
    return tmp_path / "hf"


def tokenizer_with_holes(folder: Path, end: str = END, **added: int) -> None:
    """Words 0 ... 9, special ones 390 and up, nothing between them."""
    import tokenizers

    words = {f"w{number}": number for number in range(10)} | {end: 400, "[UNK]": 399} | added
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in (end, "[UNK]", *added)])
    built.save(str(folder / "tokenizer.json"))


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))


def convert(*arguments: Any) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoint(run / "checkpoints" / "step_00000000").weights())


def test_a_snapshot_of_the_hub_is_a_folder_of_links(model: Path, tmp_path: Path) -> None:
    tokenizer_with_holes(model, "</s>")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(list(model.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{number}")
    assert convert("import", tmp_path / "snapshot", tmp_path / "run") == 0


def test_the_newer_key_of_the_rotary_base_wins(model: Path, tmp_path: Path) -> None:
    tokenizer_with_holes(model, "</s>")
    changed(model / "config.json", rope_theta=10000.0, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    assert convert("import", model, tmp_path / "run") == 0
    assert load(tmp_path / "run" / "recipe.yaml").model.rotary_base == 77.0


def test_longer_rows_come_with_longer_waves_and_never_with_shorter_ones(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer_with_holes(model, "</s>")
    assert convert("import", model, tmp_path / "short", "--set", "model.rotary_base=400") == 2
    assert (
        "the weights have 500.0; leave model.rotary_base out, or set more" in capsys.readouterr().err and not (tmp_path / "short").exists()
    )
    assert convert("import", model, tmp_path / "long", "--recipe", "owt_1b_32k") == 0
    made = load(tmp_path / "long" / "recipe.yaml").model
    assert (made.context, made.rotary_base, made.layers) == (32768, 500_000, 1)
    assert convert("import", model, tmp_path / "same", "--recipe", "fine_tune") == 0
    assert load(tmp_path / "same" / "recipe.yaml").model.rotary_base == 500.0


def test_a_single_file_wins_over_an_index_that_was_left(model: Path, tmp_path: Path) -> None:
    tokenizer_with_holes(model, "</s>")
    tensors = load_file(model / "model.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, model / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert("import", model, tmp_path / "run") == 0
    assert torch.equal(weights(tmp_path / "run")["final_norm.weight"], tensors["model.norm.weight"])


def test_what_is_no_number_or_not_whole_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer_with_holes(model, "</s>")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, model / "model.safetensors")
    assert convert("import", model, tmp_path / "run") == 1
    assert f"{name} is of type F8_E4M3, quantised" in capsys.readouterr().err and not (tmp_path / "run").exists()
    save_file(tensors, model / "model.safetensors")
    changed(model / "adapter_config.json", peft_type="LORA")
    assert convert("import", model, tmp_path / "run") == 1
    assert "merge_and_unload" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"eos_token": END}),
        ("tokenizer_config.json", {"eos_token": {"content": END, "special": True}}),
        ("generation_config.json", {"eos_token_id": [400, 399]}),
        ("config.json", {"eos_token_id": 400}),
    ],
)
def test_the_end_of_text_is_what_the_model_says(file: str, values: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Also where the file has a token of a usual name, and in the run that the import makes."""
    tokenizer_with_holes(model, **{"</s>": 398})
    changed(model / file, **values)
    assert convert("import", model, tmp_path / "run") == 0
    tokenizer = load_tokenizer(load(tmp_path / "run" / "recipe.yaml").data.tokenizer)
    assert tokenizer.end_of_text == 400 and tokenizer.fingerprint == load_tokenizer(str(model / "tokenizer.json")).fingerprint
    assert convert("export", tmp_path / "run", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == END


@pytest.mark.parametrize("own", [{}, {"<|mask|>": 398}])
def test_exports_have_masks_id_where_ids_have_holes_or_a_mask(own: dict[str, int], model: Path, tmp_path: Path, transformers: Any) -> None:
    tokenizer_with_holes(model, "</s>", **own)
    assert convert("import", model, tmp_path / "run") == 0
    assert convert("export", tmp_path / "run", tmp_path / "out") == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.mask_token_id == json.loads((tmp_path / "out" / "config.json").read_text())["mask_token_id"] == 401
    assert theirs("w3 w1", add_special_tokens=False)["input_ids"] == [3, 1]
    assert convert("import", tmp_path / "out", tmp_path / "again") == 0
    back = weights(tmp_path / "again")
    assert all(torch.equal(value, back[name]) for name, value in weights(tmp_path / "run").items())


def test_mask_begins_at_the_mean_of_what_stands_for_text(model: Path, tmp_path: Path) -> None:
    """Rows that no text has (holes, special tokens) were never trained, and may be extreme."""
    tokenizer_with_holes(model, "</s>")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][10:] = 1e4
    save_file(tensors, model / "model.safetensors")
    assert convert("import", model, tmp_path / "run") == 0
    embedding = weights(tmp_path / "run")["embedding.weight"]
    torch.testing.assert_close(embedding[401], tensors["model.embed_tokens.weight"][:10].mean(0))


def test_special_ids_without_a_row_begin_as_mask_does(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma 3 names an id of images that its text models have no row for; an end of text must have one."""
    tokenizer_with_holes(model, "</s>", **{"<image_soft_token>": 401})
    assert convert("import", model, tmp_path / "run") == 0
    theirs, ours = load_file(model / "model.safetensors"), weights(tmp_path / "run")
    words = theirs["model.embed_tokens.weight"][:10].mean(0)
    torch.testing.assert_close(ours["embedding.weight"][401:], torch.stack([words, words]))
    torch.testing.assert_close(ours["head.weight"][401], theirs["lm_head.weight"][:10].mean(0))
    changed(model / "tokenizer_config.json", eos_token="<image_soft_token>")
    assert convert("import", model, tmp_path / "other") == 1
    assert "the weights have 401 ids, but the tokenizer has 402" in capsys.readouterr().err


def test_training_at_high_mask_rates_begins_without_a_spike(model: Path, tmp_path: Path) -> None:
    """The first 50 gradient norms are those of the same model without its extreme rows, and none stands out."""
    tokenizer_with_holes(model, "</s>")
    tensors = load_file(model / "model.safetensors")
    norms = []
    for place, extreme in enumerate((0.0, 1e4)):
        tensors["model.embed_tokens.weight"][10:399] = extreme
        save_file(tensors, model / "model.safetensors")
        norms.append(gradient_norms(model, tmp_path / str(place)))
    assert len(norms[0]) == 50 and norms[0] == norms[1]
    assert max(norms[1]) < 3 * sorted(norms[1])[25], "3.4 falls to 1.3 as it learns"
