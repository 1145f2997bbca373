"""The tool of the paper's tables: every table from a tiny budget, what it concludes, and that nothing is made twice."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reproduce
import reproduce_systems
from reproduce_generation import settings
from reproduce_perplexity import SYSTEMS, comparisons
from reproduce_systems import alone, progress, train
from reproduce_texts import document_lengths

from bd3_scale import recipe as recipes
from bd3_scale.distributed.layout import Layout
from bd3_scale.errors import UserError

RECIPE = """
model: {context: 32, layers: 1, hidden: 16, heads: 2, initial_std: 0.3}
data: {path: DATA, tokenizer: bytes}
training: {steps: 4, global_batch: 4}
validation: {every: 0, rows: 8}
checkpoint: {every: 0}
tracking: {sample_tokens: 0, progress: false}
"""


class Tool:
    """The command on a tiny recipe, its trainings in this process."""

    def __init__(self, folder: Path, here: Layout) -> None:
        self.folder, self.here, self.trained = folder, here, list[str]()
        (folder / "recipe.yaml").write_text(RECIPE.replace("DATA", str(folder / "data")))

    def train(self, name: str, folder: Path, arguments: list[str], **_: Any) -> None:
        from bd3_scale import train

        self.trained.append(name)
        recipe = recipes.load(arguments[0], arguments[1:])
        assert Path(recipe.run.dir) == folder and recipe.training.steps == 2
        train.train(recipe, self.here)

    def __call__(self, table: str, *words: str) -> int:
        places = ["--recipe", str(self.folder / "recipe.yaml"), "--work", str(self.folder / "work"), "--out", str(self.folder / "out")]
        return reproduce.main([table, "--budget", "0.5", *places, *words])

    def report(self, table: str) -> tuple[dict[str, Any], str]:
        (path,) = (self.folder / "out").glob(f"*-reproduce-{table}.json")
        assert 1000 < path.with_suffix(".png").stat().st_size < 150_000
        return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.fixture(scope="module")
def tool(world_of_one: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tool]:
    from tests.unit.evaluation.conftest import save_data

    made = Tool(tmp_path_factory.mktemp("reproduce"), world_of_one)
    save_data(made.folder / "data", context=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce_systems, "train", made.train)
        yield made


def test_a_table_is_written_when_every_call_has_done_its_part(tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool("perplexity", "--only", "ar", "mdlm") == 0
    assert "no table yet: bd3-l-4, bd3-l-8, bd3-l-16, sedd missing" in capsys.readouterr().out
    assert not (tool.folder / "out").exists()
    assert tool("perplexity") == 0 and tool("perplexity") == 0
    assert tool.trained == ["AR", "MDLM", "BD3 L' = 4", "BD3 L' = 8", "BD3 L' = 16", "SEDD"]  # each once
    report, text = tool.report("perplexity")
    assert [line["system"] for line in report["rows"]] == [system.name for system in SYSTEMS]
    assert {line["step"] for line in report["rows"]} == {2} and len({line["rows"] for line in report["rows"]}) == 1
    assert [line["exact"] for line in report["rows"]] == [True, False, False, False, False, False]
    assert [line["block_size"] for line in report["rows"]] == [1, 4, 8, 16, 32, 32]
    for line in report["rows"]:
        assert f"| {line['system']} | {line['perplexity']:.3f} |" in text and "row_nelbo" not in line
    assert len(report["comparisons"]) == 4 and "| 28.23 | 20.73 |" in text

    # More draws are another question of all but AR, whose likelihood is exact.
    assert tool("perplexity", "--draws", "2", "--only", "ar", "sedd") == 0
    said = capsys.readouterr().out
    assert "SEDD: perplexity" in said and "AR: perplexity" not in said and len(tool.trained) == 6


def test_zero_shot_sets_are_read_by_all(tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    (tool.folder / "ptb.txt").write_text("it 's a text of <unk> words\n" * 20)
    (tool.folder / "news.txt").write_text("Something happened in a place.\n" * 30)
    assert tool("zero-shot") == 2 and tool("zero-shot", "--set", "c4=x") == 2
    assert capsys.readouterr().err.count("NAME=FILE") == 2
    sets = [f"--set=ptb={tool.folder / 'ptb.txt'}", f"--set=ag_news={tool.folder / 'news.txt'}"]
    assert tool("zero-shot", *sets, "--rows", "3", "--cache", str(tool.folder / "cache")) == 0
    report, text = tool.report("zero-shot")
    assert [line["system"] for line in report["rows"]] == [system.name for system in SYSTEMS]
    assert all(line["perplexities"][name]["rows"] == 3 for line in report["rows"] for name in ("ptb", "ag_news"))
    assert "| paper: BD3 L' = 4 (OpenWebText) | 96.81 | 61.67 |" in text


def test_lengths_of_texts_that_may_end(tool: Tool) -> None:
    assert tool("lengths", "--samples", "3", "--batch-size", "2", "--longest", "48", "--minimum-entropy", "0") == 0
    report, text = tool.report("lengths")
    assert [line["system"] for line in report["rows"]] == ["AR", "BD3 L' = 16", "SEDD"]
    assert [line["options"]["length"] for line in report["rows"]] == [48, 48, 32]  # SEDD ends with its context
    for line in report["rows"]:
        assert sum(line["stops"].values()) == len(line["lengths"]) == 3 and line["length_max"] == max(line["lengths"])
    # What was prepared: 15 documents of 40 tokens for training, the first and last of the stream cut or without a neighbour.
    assert report["document_lengths"] and set(report["document_lengths"]) == {40}
    assert "| training text | 40 | 40 |" in text and "798 / 9982" in text


def test_generative_perplexity_against_network_calls(tool: Tool) -> None:
    words = ["generation", "--samples", "2", "--batch-size", "2", "--steps", "2", "4"]
    assert tool(*words) == 0
    report, text = tool.report("generation")
    before = {path: path.stat().st_mtime_ns for path in (tool.folder / "work").glob("*/texts/*/samples.jsonl")}
    for line, system in zip(report["rows"], reproduce_systems.SYSTEMS, strict=True):
        assert line["system"] == system.name
        for contexts in (1, 2):
            of = [one for one in line["texts"] if one["contexts"] == contexts]
            assert [one["nfe"] for one in of] == sorted(one["nfe"] for one in of), system.name
            assert all(one["length_median"] == 32 * contexts - 1 and one["generative_perplexity"] > 1 for one in of)
            assert f"| {system.generation[contexts - 1]} |" in text
    assert [one["steps"] for one in report["rows"][1]["texts"]] == [2, None, 2, None]  # L' = 4 has no 4 steps fewer than tokens
    assert [one["nfe"] for one in report["rows"][0]["texts"]] == [31, 63]
    assert report["real"]["entropy"] > 0 and "| real text, 32 tokens |" in text
    assert (tool.folder / "work" / "generation.html").read_text().count("<th>") > 6

    # The same again makes no texts; other numbers of steps make only those.
    assert tool(*words) == 0 and tool(*words, "8") == 0
    after = {path: path.stat().st_mtime_ns for path in (tool.folder / "work").glob("*/texts/*/samples.jsonl")}
    assert before.items() <= after.items() and len(after) == len(before) + 2 * 4  # L' = 16, MDLM, SEDD and SSD-LM


def test_studies_are_handed_over(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import study

    calls: list[list[str]] = []
    monkeypatch.setattr(study, "main", lambda words: calls.append(words) or 0)
    assert reproduce.main(["single-token", "--budget", "0.5", "--points", "2"]) == 0
    assert reproduce.main(["schedules", "model.hidden=64", "--steps", "7"]) == 0
    assert calls == [["single-token", "--points", "2", "--steps", "1000"], ["schedules", "model.hidden=64", "--steps", "7"]]
    assert reproduce.main(["schedules", "--budget", "2", "--steps", "7"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_neighbours_are_compared_row_by_row() -> None:
    """Common noise of the rows cancels: a difference far below the spread of rows is still told from none."""
    numbers = np.random.Generator(np.random.Philox(1))
    rows = numbers.normal(3, 1, 200)
    offsets = {"AR": 0.0, "BD3 L' = 4": 0.1, "BD3 L' = 8": 0.1, "BD3 L' = 16": 0.05, "MDLM": 0.3, "SEDD": 0.0}
    lines = [{"system": one.name, "row_nelbo": rows + offsets[one.name] + numbers.normal(0, 0.02, 200)} for one in SYSTEMS]
    found = {one["expected"]: one for one in comparisons(lines)}
    assert len(found) == 4  # SEDD stands beside
    first = found["AR < BD3 L' = 4"]
    assert first["holds"] == "yes" and first["difference"] == pytest.approx(0.1, abs=0.01) and first["error"] < 0.01
    assert found["BD3 L' = 8 < BD3 L' = 16"]["holds"] == "no" and found["BD3 L' = 16 < MDLM"]["holds"] == "yes"
    same = found["BD3 L' = 4 < BD3 L' = 8"]
    assert abs(same["difference"]) < 4 * same["error"]


def test_steps_are_fewer_than_the_tokens_of_a_block() -> None:
    of = {system.name: settings(system, size, [64, 1, 4]) for system, size in zip(SYSTEMS, [1, 4, 8, 16, 128, 128], strict=True)}
    first_hitting = {"sampler": "first_hitting", "steps": None}
    assert of["AR"] == [first_hitting]
    assert of["BD3 L' = 4"] == [{"sampler": "ancestral", "steps": 1}, first_hitting]
    assert [one["steps"] for one in of["MDLM"]] == [1, 4, 64, None]
    assert [one["steps"] for one in settings(reproduce_systems.SYSTEMS[-1], 4, [64, 1])] == [1, 64]  # SSD-LM has no finest
    assert [(one["sampler"], one["steps"]) for one in of["SEDD"]] == [("analytic", steps) for steps in (1, 4, 64, 128)]


def test_documents_cut_by_the_first_and_last_row_are_not_counted() -> None:
    class Loaded:
        recipe = argparse.Namespace(data=argparse.Namespace(row_special="bos"), model=argparse.Namespace(context=5))
        tokenizer = argparse.Namespace(end_of_text=9)

    class Rows:
        def __len__(self) -> int:
            return 3

        def rows(self, indices: np.ndarray) -> np.ndarray:
            return np.array([[9, 1, 1, 9, 2], [9, 2, 2, 9, 9], [9, 3, 9, 4, 4]])[indices]

    assert document_lengths(Loaded(), Rows(), 10) == [3, 0, 1]
    assert document_lengths(Loaded(), Rows(), 2) == [3, 0]


def test_progress_says_what_is_left() -> None:
    assert progress("MDLM", 300, 900, 2.5, 1800) == "MDLM: step 300 of 900, 2.50 steps/s, 04:00 left, 16:00 for all of this call"
    assert progress("SEDD", 0, 900, 0.0, 0) == "SEDD: step 0 of 900, 0.00 steps/s"


def test_a_run_is_worked_on_by_one_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def second() -> None:
        with alone(tmp_path / "run"):
            order.append("second")

    with alone(tmp_path / "run"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and "another process is at it" in capsys.readouterr().out


def test_a_training_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("training: {stepz: 1}\n")
    with alone(tmp_path / "run") as lock, pytest.raises(UserError, match=r"AR \(.*run.log\): bd3_scale: error: .*stepz"):
        train("AR", tmp_path / "run", [str(tmp_path / "recipe.yaml")], steps=1, behind=0, lock=lock)
