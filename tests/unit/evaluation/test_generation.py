"""Evaluation of generated texts: which texts, what they cost, and the numbers that are made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bd3_scale.errors import DataError
from bd3_scale.evaluation.generation import Text, counted_calls, generate_texts, summary
from bd3_scale.evaluation.judge import load_judge
from bd3_scale.evaluation.page import write_results
from bd3_scale.evaluation.world import load_replicas
from bd3_scale.generation.generate import generate_tokens

Checkpoints = Callable[..., Path]
SYSTEMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"block_size": 4}, {"length": 22}),
    ({"block_size": 4}, {"length": 22, "sampler": "ancestral", "steps": 2, "use_cache": False}),
    ({"kind": "mdlm"}, {"length": 30, "sampler": "ancestral", "steps": 3}),
    ({"kind": "ar"}, {"length": 22}),
]


@pytest.mark.parametrize(("objective", "options"), SYSTEMS)
def test_texts_are_those_of_their_seed_and_row_whatever_the_batch(
    objective: dict[str, Any], options: dict[str, Any], checkpoint: Checkpoints
) -> None:
    """And the calls that a hook on the network counts are those that the sampler reports, else this would raise."""
    loaded, layout = load_replicas(checkpoint(**objective), device="cpu")
    single = generate_texts(loaded, layout, samples=5, batch=1, seed=3, **options)
    batched = generate_texts(loaded, layout, samples=5, batch=2, seed=3, **options)
    assert [text.row for text in single] == list(range(5)) and len({text.text for text in single}) > 1
    assert [text.tokens for text in single] == [text.tokens for text in batched]
    again = generate_tokens(loaded, batch=1, seed=single[3].seed, first_row=single[3].row, **options)
    assert again.tokens[0].tolist() == single[3].tokens and again.nfe == single[3].nfe
    assert loaded.tokenizer.mask_id not in np.concatenate([text.tokens for text in single])


def test_calls_are_counted_at_the_network(checkpoint: Checkpoints) -> None:
    loaded, _ = load_replicas(checkpoint(block_size=4), device="cpu")
    with counted_calls(loaded.network) as calls:
        for _ in range(3):
            loaded.network.decode(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4), None, None, last=1)
    loaded.network.decode(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4), None, None, last=1)
    assert calls == [3]


def made(row: int, tokens: list[int], stop: str, nll: float | None, judged: int | None) -> Text:
    return Text(row, 0, "x" * (len(tokens) - 1), tokens, stop, 10 + row, 0.5 if len(tokens) > 1 else None, nll, judged)


def test_the_numbers_of_a_table() -> None:
    texts = [
        made(0, [9, 1, 2], "length", 2 * math.log(4.0), 2),
        made(1, [9, 1, 2, 3, 4], "end_of_text", 6 * math.log(2.0), 6),
        made(2, [9], "end_of_text", 0.0, 0),
    ]
    numbers = summary(texts)
    assert (numbers["samples"], numbers["empty"], numbers["length_median"], numbers["length_max"]) == (3, 1, 2.0, 4)
    assert numbers["stops"] == {"end_of_text": 2, "length": 1} and numbers["nfe"] == 11 and numbers["entropy"] == 0.5
    assert numbers["generative_perplexity"] == pytest.approx((4 + 2) / 2)
    assert numbers["generative_perplexity_pooled"] == pytest.approx(2 ** (10 / 8))
    assert summary([made(0, [9, 1], "length", None, None)])["generative_perplexity"] is None


def test_results_can_be_read_and_shown_beside_others(checkpoint: Checkpoints, tmp_path: Path) -> None:
    loaded, layout = load_replicas(checkpoint(kind="ar"), device="cpu")
    texts = generate_texts(loaded, layout, samples=3, batch=3, seed=0, judge=load_judge(checkpoint(kind="ar"), loaded.device), length=12)
    document = summary(texts)
    write_results(tmp_path / "first", texts, document)
    write_results(tmp_path / "second", [made(0, [9, 1], "length", None, None)], {"samples": 1}, beside=[tmp_path / "first"])
    kept = [json.loads(line) for line in (tmp_path / "first" / "samples.jsonl").read_text().splitlines()]
    assert [Text(**line) for line in kept] == texts
    assert json.loads((tmp_path / "first" / "summary.json").read_text()) == document
    assert (tmp_path / "first" / "lengths.png").stat().st_size > 1000
    shown = (tmp_path / "second" / "page.html").read_text()
    assert "<th>first</th>" in shown and "<th>second</th>" in shown and f"{document['generative_perplexity']:.4g}" in shown
    with pytest.raises(DataError, match="cannot be written"):
        write_results(tmp_path / "first", texts, document)
    with pytest.raises(DataError, match="--beside"):
        write_results(tmp_path / "third", texts, document, beside=[tmp_path])
    assert not (tmp_path / "third").exists()
