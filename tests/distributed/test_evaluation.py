"""Two processes evaluate what one does: likelihood and texts, each with other rows, and as one group of tensor or context ranks."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from bd3_scale.evaluate import main
from tests.distributed.launch import ALL, launch
from tests.distributed.test_sampling import NETWORKS, save
from tests.unit.evaluation.conftest import save_data

ROWS = 11
"""Odd, so that the shares of two ranks differ."""


@pytest.fixture(scope="module")
def networks(world_of_one: object, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp("run"), *NETWORKS[name]) for name in ("grouped", "next_token")}


def by_one(*arguments: str) -> dict[str, Any]:
    """What this process, a world of its own, answers."""
    with redirect_stdout(StringIO()) as said:
        assert main([*arguments, "--device", "cpu", "--json"]) == 0
    return json.loads(said.getvalue())


def by_two(log: Path, *arguments: str) -> dict[str, Any]:
    finished = launch(2, ["-m", "bd3_scale.evaluate", *arguments, "--device", "cpu", "--json"], log)
    assert finished.status == 0, finished.output[-6000:]
    start = finished.output.index("{\n")  # other words may precede it
    return json.loads(finished.output[start : finished.output.rindex("}") + 1])


@pytest.mark.parametrize(
    ("name", "zero_shot", "options"),
    [
        ("grouped", False, []),
        ("grouped", False, ["--context", "2"]),
        ("next_token", True, ["--tensor", "2"]),
        *([("next_token", False, ["--context", "2"])] if ALL else []),
    ],
)
def test_any_number_of_processes_gives_the_same_likelihood(
    name: str, zero_shot: bool, options: list[str], networks: dict[str, Path], tmp_path: Path
) -> None:
    if zero_shot:
        (tmp_path / "valid.txt").write_text("it 's a text of <unk> words\n" * 20)
        rows = ["--zero-shot", "ptb", "--source", str(tmp_path / "valid.txt"), "--cache", str(tmp_path / "cache")]
    else:
        rows = ["--data", str(save_data(tmp_path / "data"))]
    command = ["likelihood", str(networks[name]), *rows, "--rows", str(ROWS), "--micro-batch", "4", "--row-values"]
    two = by_two(tmp_path / "log", *command, *options)  # makes the cache, each rank after the other
    one = by_one(*command)
    assert (one["processes"], two["processes"], one["rows"], two["rows"]) == (1, 2, ROWS, ROWS)
    for key in ("nelbo", "standard_error", "row_nelbo"):
        assert two[key] == pytest.approx(one[key], rel=1e-6), key


def test_any_number_of_processes_gives_the_same_texts(networks: dict[str, Path], tmp_path: Path) -> None:
    command = [
        "generation",
        str(networks["grouped"]),
        "--samples",
        "5",
        "--batch-size",
        "2",
        "--length",
        "22",
        "--ignore-eos",
        "--seed",
        "3",
    ]
    command += ["--judge", str(networks["next_token"]), "--output"]
    one, two = by_one(*command, str(tmp_path / "one")), by_two(tmp_path / "log", *command, str(tmp_path / "two"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2) and one["generative_perplexity"] > 1
    assert two == {key: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value for key, value in one.items()}
    texts = [[json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert [text["tokens"] for text in texts[0]] == [text["tokens"] for text in texts[1]] and len(texts[0]) == 5
    assert [text["row"] for text in texts[1]] == list(range(5))  # in their order, whoever made them
