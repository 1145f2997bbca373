"""Prompts and answers from end to end: an imported causal model learns a rule, and answers questions that it never saw."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import torch

from bd3_scale.convert import __main__ as convert
from bd3_scale.data.chat import ChatTemplate
from bd3_scale.data.formats.streaming_compat import prepare_torchvision
from bd3_scale.data.preparation.prepare import Packing
from bd3_scale.data.preparation.prepare_corpus import Corpus, prepare_corpus
from bd3_scale.generation.generate import generate_tokens
from bd3_scale.generation.load_model import load_network
from tests.distributed.forked import run_ranks
from tests.unit.data.test_chat import chatty

LETTERS = "abcdefghij"
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ '=>' if m.role == 'user' else eos_token }}{% endfor %}"
"""Short, so that the test is: with the token before it a question has five, and an answer begins inside of a block of four."""
TRAINED = ["model.context=8", "training.steps=100", "training.global_batch=64", "training.learning_rate=4e-3", "training.warmup=10",
           "training.ema=0.9", "validation.every=50", "validation.rows=16", "checkpoint.every=0", "tracking.every=20",
           "tracking.plots=false"]  # fmt: skip


def answer_to(question: str) -> str:
    """Every letter becomes the one after it."""
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in question)


def right(run: Path, questions: list[str]) -> float:
    """Share of the questions that the latest checkpoint of a run answers exactly."""
    loaded = load_network(str(run), device="cpu")
    tokenizer, template = loaded.tokenizer, ChatTemplate(loaded.tokenizer)
    prompts = tokenizer.encode_chat([template.prompt([{"role": "user", "content": question}]) for question in questions])
    result = generate_tokens(loaded, prompts=prompts, length=8, temperature=0.0)
    found = [row[prompt:].tolist() for row, prompt in zip(result.tokens, result.prompt_lengths, strict=True)]
    wanted = [[*tokenizer.encode(answer_to(question)), tokenizer.end_of_text] for question in questions]
    return sum(one == other for one, other in zip(found, wanted, strict=True)) / len(questions)


def test_an_imported_model_learns_to_answer(tmp_path: Path) -> None:
    prepare_torchvision()
    import transformers

    tokenizer = chatty(tmp_path / "model", TEMPLATE)
    torch.manual_seed(0)
    end = tokenizer.end_of_text
    config = transformers.LlamaConfig(vocab_size=tokenizer.vocabulary_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                      num_attention_heads=4, max_position_embeddings=8, bos_token_id=end, eos_token_id=end)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    words = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]
    words = [words[place] for place in np.random.default_rng(0).permutation(len(words))]
    turns = [[{"role": "user", "content": word}, {"role": "assistant", "content": answer_to(word)}] for word in words]
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    packing = Packing(tokenizer, 8, kind="document", records="messages")
    prepare_corpus(tmp_path / "data", packing, Corpus((str(tmp_path / "turns.jsonl"),), held_out_last=20), workers=1, progress=False)
    run = tmp_path / "run"
    command = ["import", str(tmp_path / "model"), str(run), "--data", str(tmp_path / "data"), "--block-size", "4", "--set", *TRAINED]
    assert convert.main(command) == 0
    assert right(run, words[-20:]) == 0.0
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([[str(run / "recipe.yaml"), []]]))
    finished = run_ranks(1, ["tests/distributed/worker.py", str(plan)], tmp_path / "train.log", timeout=300)
    assert finished.status == 0, finished.output[-4000:]
    assert right(run, words[-20:]) >= 0.9
