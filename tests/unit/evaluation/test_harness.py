"""The adapter for lm-evaluation-harness: one task of each kind, offline, from a tiny file. Skipped where it is not installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bd3_scale.data.formats.streaming_compat import prepare_torchvision
from bd3_scale.evaluation.continuation import continuation_log_likelihood

prepare_torchvision()
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install bd3_scale[harness])")

QUESTIONS = [{"question": "abc", "choices": [" d", " ea"], "answer": 0}, {"question": "ab ab", "choices": [" ab", " c"], "answer": 1}]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}, cache_dir: CACHE}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["a"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.parametrize("objective", [{"block_size": 4}, {"kind": "ar"}])
def test_tasks_from_a_local_file(objective: dict, checkpoint: Callable[..., Path], tmp_path: Path, world_of_one: object) -> None:
    from lm_eval.tasks import TaskManager

    from bd3_scale.evaluation.harness import BlockDiffusionLM

    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        text = text.replace("FILE", str(tmp_path / "questions.jsonl")).replace("CACHE", str(tmp_path / "cache"))
        (tmp_path / f"{name}.yaml").write_text(text)
    model = BlockDiffusionLM(str(checkpoint(**objective)), draws=4, device="cpu")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=["tiny_choice", "tiny_write"], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    samples = found["samples"]["tiny_choice"]
    right = 0
    for line, sample in zip(QUESTIONS, sorted(samples, key=lambda sample: sample["doc_id"]), strict=True):
        expected = [
            continuation_log_likelihood(model.loaded, list(line["question"].encode()), list(choice.encode()), draws=4)
            for choice in line["choices"]
        ]
        got = [float(answer[0][0]) for answer in sample["resps"]]
        assert got == pytest.approx(expected, rel=1e-6)
        right += expected.index(max(expected)) == line["answer"]
    assert found["results"]["tiny_choice"]["acc,none"] == right / 2
    texts = [sample["resps"][0][0] for sample in found["samples"]["tiny_write"]]
    assert len(texts) == 2 and all("a" not in text for text in texts)
