"""The adapter for lm-evaluation-harness: one task of each kind, offline, from a tiny file. Skipped where it is not installed."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
generation_kwargs: {until: ["a", "cc"], max_gen_toks: 600, num_beams: 1, top_k: 50, do_sample: true, temperature: 0.7}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Any:
    """Both, with five times their questions."""
    from lm_eval.tasks import TaskManager

    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS * 5))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        text = text.replace("FILE", str(tmp_path / "questions.jsonl")).replace("CACHE", str(tmp_path / "cache"))
        (tmp_path / f"{name}.yaml").write_text(text)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def answers(tasks: Any, model: Any, names: Sequence[str] = ("tiny_choice", "tiny_write")) -> dict[str, list[Any]]:
    found = lm_eval.simple_evaluate(model=model, tasks=list(names), task_manager=tasks, log_samples=True, bootstrap_iters=0)
    return {name: [one["resps"] for one in sorted(found["samples"][name], key=lambda one: one["doc_id"])] for name in names}


class Request:
    """As the harness hands it over."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args


class Replica:
    """One of two replicas that are threads."""

    def __init__(self, rank: int, met: threading.Barrier, box: dict[int, Any]) -> None:
        self.data_rank, self.data, self.reports_for_replica, self.is_main_rank = rank, 2, True, rank == 0
        self.met, self.box = met, box

    def all_gather(self, value: Any) -> list[Any]:
        self.box[self.data_rank] = value
        self.met.wait(60)
        found = [self.box[0], self.box[1]]
        self.met.wait(60)
        return found


@pytest.mark.parametrize("objective", [{"block_size": 4}, {"kind": "ar"}])
def test_tasks_from_a_local_file(objective: dict, checkpoint: Callable[..., Path], tasks: Any, world_of_one: object) -> None:
    from bd3_scale.evaluation.harness import BlockDiffusionLM

    model = BlockDiffusionLM(str(checkpoint(**objective)), draws=4, device="cpu")
    found = lm_eval.simple_evaluate(
        model=model, tasks=["tiny_choice", "tiny_write"], task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    samples = found["samples"]["tiny_choice"]
    right = 0
    for line, sample in zip(QUESTIONS * 5, sorted(samples, key=lambda sample: sample["doc_id"]), strict=True):
        expected = [
            continuation_log_likelihood(model.loaded, list(line["question"].encode()), list(choice.encode()), draws=4)
            for choice in line["choices"]
        ]
        got = [float(answer[0][0]) for answer in sample["resps"]]
        assert got == pytest.approx(expected, rel=1e-6)
        right += expected.index(max(expected)) == line["answer"]
    assert found["results"]["tiny_choice"]["acc,none"] == right / 10
    texts = [sample["resps"][0][0] for sample in found["samples"]["tiny_write"]]
    assert len(texts) == 10 and all("a" not in text for text in texts)


def test_answers_depend_on_the_request_alone(
    checkpoint: Callable[..., Path], tasks: Any, world_of_one: object, caplog: pytest.LogCaptureFixture
) -> None:
    """One at a time, sixteen at a time, by one process and by two; what is not done here is said once."""
    from bd3_scale.evaluation.harness import BlockDiffusionLM

    def make(batch_size: int) -> BlockDiffusionLM:
        return BlockDiffusionLM(str(checkpoint(block_size=4)), draws=4, device="cpu", batch_size=batch_size)

    with caplog.at_level(logging.WARNING, "bd3_scale"):
        alone = answers(tasks, make(1))
    said = [record.message for record in caplog.records if record.name.startswith("bd3_scale")]
    assert [line.split(";")[0].partition(" of ")[0] for line in said] == [
        "generation option top_k=50 does nothing here", "max_gen_toks=600 does not fit into the model's context",
    ]  # fmt: skip
    together = answers(tasks, make(16))
    met, box, shares = threading.Barrier(2), {}, [{}, {}]
    requests = [Request((line["question"], {"until": ["a", "cc"], "max_gen_toks": 9, "do_sample": True})) for line in QUESTIONS * 5]
    models = [make(3), make(3)]

    def share(rank: int) -> None:
        models[rank].layout = Replica(rank, met, box)
        shares[rank]["texts"] = models[rank].generate_until(requests, disable_tqdm=True)
        shares[rank]["numbers"] = models[rank].loglikelihood_rolling([Request((line["question"] * 9,)) for line in QUESTIONS])

    threads = [threading.Thread(target=share, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = make(16)
    assert together["tiny_write"] == alone["tiny_write"] and len({str(one) for one in alone["tiny_write"][0::2]}) > 1
    assert shares[0]["texts"] == shares[1]["texts"] == whole.generate_until(requests, disable_tqdm=True)
    assert shares[0]["numbers"] == shares[1]["numbers"]
    expected = whole.loglikelihood_rolling([Request((line["question"] * 9,)) for line in QUESTIONS], disable_tqdm=True)
    assert shares[0]["numbers"] == pytest.approx(expected, rel=1e-6)
