"""The examples are run: what stands in them is what a user copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bd3_scale.data.formats.streaming_compat import prepare_torchvision

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Qwen3 of random weights over bytes, as a folder of Hugging Face's."""
    import tokenizers

    prepare_torchvision()
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    text = tokenizers.Tokenizer(tokenizers.models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    text.pre_tokenizer, text.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    text.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True)])
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=257, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, eos_token_id=256,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen3")
    text.save(str(tmp_path / "qwen3" / "tokenizer.json"))
    return tmp_path / "qwen3"


def test_from_qwen3_to_a_folder_for_others(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"Line {n} of a text. " * 4}) + "\n" for n in range(300)))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "bd3").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bd3_scale "$@"\n')
    (programs / "bd3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CONTEXT": "32", "BLOCK": "4", "OMP_NUM_THREADS": "1"}
    small = ["training.steps=2", "training.global_batch=4", "validation.rows=2", "run.device=cpu", "tracking.plots=false"]
    command = [EXAMPLES / "from_qwen3.sh", model, tmp_path / "text.jsonl", tmp_path / "run", *small]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((tmp_path / "run-served" / "config.json").read_text())
    assert config["vocab_size"] == 258 and (tmp_path / "run-served" / "model.safetensors").exists()
    assert "finished: 2 of 2 steps" in done.stdout and "--- text 1 of 1" in done.stdout
