"""LLaDA and Dream: our network of the imported weights computes the logits of the same network without a causal mask, MASK where theirs is.

Their modelling code is theirs to distribute: the reference is transformers' Llama and Qwen2, of which these networks are made, under
LLaDA's names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.generation.load_model import load_network
from bd3_scale.recipe import load
from bd3_scale.rules.validate import validate
from tests.unit.convert.test_causal import LENGTH, convert, transformers  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("world_of_one")

IDS, ALL, THEIRS = 257, 270, 262
"""Ids of text; rows of the vocabulary; their MASK. Ours is 257."""
SHAPE: dict[str, Any] = {"vocab_size": ALL, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
                         "num_key_value_heads": 3, "max_position_embeddings": 32, "rope_theta": 500.0, "rms_norm_eps": 1e-4,
                         "attn_implementation": "eager"}  # fmt: skip
LLADA = {"embed_tokens": "transformer.wte", "norm": "transformer.ln_f", "lm_head": "transformer.ff_out", "layers": "transformer.blocks",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj",
         "o_proj": "attn_out", "gate_proj": "ff_proj", "up_proj": "up_proj", "down_proj": "ff_out"}  # fmt: skip


def save(kind: str, library: Any, folder: Path, tied: bool) -> Any:
    """A folder as those models lie on the hub -> the reference."""
    torch.manual_seed(0)
    family = {"llada": "Llama", "Dream": "Qwen2"}[kind]
    config = getattr(library, f"{family}Config")(**SHAPE, tie_word_embeddings=tied)
    model = getattr(library, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    if kind == "Dream":
        said = json.loads((folder / "config.json").read_text()) | {"model_type": kind, "mask_token_id": THEIRS}
    else:
        tensors = {}
        for name, value in model.state_dict().items():
            parts = name.removeprefix("model.").removesuffix(".weight").split(".")
            if not (tied and parts == ["lm_head"]):
                renamed = ".".join(LLADA.get(part, part) for part in parts if part not in ("self_attn", "mlp"))
                tensors[f"model.{renamed}.weight"] = value.contiguous()
        save_file(tensors, folder / "model.safetensors")
        said = {"model_type": kind, "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True,
                "d_model": 36, "n_heads": 6, "n_kv_heads": 3, "n_layers": 2, "mlp_hidden_size": 40, "max_sequence_length": 32,
                "rope_theta": 500.0, "rms_norm_eps": 1e-4, "vocab_size": ALL, "mask_token_id": THEIRS,
                "weight_tying": tied}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))
    return model


@pytest.mark.parametrize(("kind", "tied"), [("llada", False), ("llada", True), ("Dream", False)])
def test_logits_of_masked_rows_are_theirs(kind: str, tied: bool, transformers: Any, tmp_path: Path) -> None:  # noqa: F811
    model = save(kind, transformers, tmp_path / "hf", tied)
    assert convert("import", tmp_path / "hf", tmp_path / "run", "--tokenizer", "bytes") == 0
    recipe = load(tmp_path / "run" / "recipe.yaml")
    validate(recipe)
    assert recipe.objective.kind == "mdlm" and recipe.model.context == 32
    tokens = torch.randint(0, IDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    with torch.no_grad():
        all_seen = torch.zeros(1, 1, LENGTH, LENGTH)
        expected = model(tokens.masked_fill(masked, THEIRS), attention_mask=all_seen).logits[..., :IDS]
    network = load_network(tmp_path / "run", device="cpu").network
    found = network.decode(tokens.masked_fill(masked, IDS), torch.arange(LENGTH), None, None, last=LENGTH)
    torch.testing.assert_close(found[..., :IDS], expected, rtol=1e-5, atol=1e-5)
    embedding = Checkpoint(tmp_path / "run" / "checkpoints" / "step_00000000").read("weight", "embedding.weight")
    assert torch.equal(embedding[IDS], model.get_input_embeddings().weight[THEIRS])


def test_they_go_on_as_block_diffusion_too(transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    save("Dream", transformers, tmp_path / "hf", False)
    assert convert("import", tmp_path / "hf", tmp_path / "run", "--tokenizer", "bytes", "--objective", "bd3", "--block-size", "8") == 0
    assert load(tmp_path / "run" / "recipe.yaml").objective.block_size == 8
    said = capsys.readouterr().out
    assert "its row is their row 262" in said and "predicts a token in the row before it" in said


def test_what_a_llada_has_besides_is_refused(transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    save("llada", transformers, tmp_path / "hf", False)
    config = tmp_path / "hf" / "config.json"
    plain = json.loads(config.read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"alibi": True}, "alibi = True"),
        ({"mask_token_id": ALL}, "mask_token_id = 270"),
        ({"mask_token_id": None}, "no mask_token"),
    ]
    for change, said in changes:
        config.write_text(json.dumps({**plain, **change}))
        assert convert("import", tmp_path / "hf", tmp_path / "run", "--tokenizer", "bytes") == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
