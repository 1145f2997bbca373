"""An imported causal model learns the rule of 2,000 made questions and answers, and answers questions that it has not seen.

Minutes, so `BD3_ALL_LAYOUTS=1` only; benchmarks/2026-11-27-prompts.md has the numbers.
"""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from bd3_scale.data.formats.streaming_compat import prepare_torchvision
from tests.distributed.conftest import metrics
from tests.distributed.launch import ALL, ROOT

pytestmark = [pytest.mark.skipif(not ALL, reason="minutes; BD3_ALL_LAYOUTS=1"), pytest.mark.timeout(1800)]
FOLLOWING = str.maketrans(string.ascii_lowercase, string.ascii_lowercase[1:] + "a")
"""The rule: every letter of the answer is the one that follows in the alphabet, qdv -> rew."""


def bd3(folder: Path, verb: str, *arguments: str) -> str:
    """What the command prints to stdout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "bd3_scale", verb, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def save_llama(folder: Path) -> None:
    """A causal model of two layers, with the random weights that transformers gives it, over bytes and the end of text."""
    prepare_torchvision()
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=257, max_position_embeddings=32, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def test_held_out_questions_are_answered_by_the_rule(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    words = ["".join(letters) for letters in product(string.ascii_lowercase, repeat=3)]
    drawn = random.Random(0).sample(words, 2200)
    for name, chosen in (("train", drawn[:2000]), ("held-out", drawn[2000:])):
        said = [[("user", word), ("assistant", word.translate(FOLLOWING))] for word in chosen]
        messages = [{"messages": [{"role": role, "content": content} for role, content in both]} for both in said]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in messages))
    save_llama(tmp_path / "model")
    options = ["--records", "messages", "--tokenizer", "bytes", "--context", "32", "--path", "data"]
    bd3(tmp_path, "prepare", "--source", "train.jsonl", "--validation", "held-out.jsonl", *options)
    keys = "model.context=32 training.tokens=null training.steps=300 training.learning_rate=2e-3 parallel.micro_batch=null"
    keys += " validation.rows=200 model.head_loss=eager run.device=cpu"
    fine_tune = ["--recipe", "fine_tune", "--block-size", "4", "--tokenizer", "bytes", "--data", "data"]
    bd3(tmp_path, "convert", "import", "model", "run", *fine_tune, "--set", *keys.split())

    def answered(temperature: str) -> int:
        """Answers that are the word and nothing else, of 200."""
        sampling = ["--batch-size", "200", "--length", "32", "--temperature", temperature, "--json", "--device", "cpu"]
        texts = json.loads(bd3(tmp_path, "sample", "run", "--chat", *drawn[2000:], *sampling))["texts"]
        right = [(word.translate(FOLLOWING), "end_of_text") for word in drawn[2000:]]
        return sum((text["answer"], text["stop"]) == wanted for text, wanted in zip(texts, right, strict=True))

    before = answered("0")
    bd3(tmp_path, "train", "run/recipe.yaml")
    greedy, drawn_ones = answered("0"), answered("1")
    nelbo = [line["nelbo"] for line in metrics(tmp_path / "run") if line["kind"] == "validation"]
    record_property("table", f"exact of 200: {before} before, {greedy} after (temperature 1: {drawn_ones}), NELBO {nelbo}")
    assert before < 10 and greedy > 180
