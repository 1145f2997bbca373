"""A file of prompts: the file of texts is the same through any number of slots, and however often the command was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bd3_scale.generation import prompts_file
from bd3_scale.generation.generate import generate_tokens
from bd3_scale.generation.load_model import load_network
from bd3_scale.sample import main
from tests.unit.test_sample_command import save_run

pytestmark = pytest.mark.usefixtures("world_of_one")

PROMPTS = ["a", "", "Return the", "bb\tc", *(f"{number} words" for number in range(16))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


def arguments(run: Path, folder: Path, output: str, *more: str) -> list[str]:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return [str(run), "--prompts-file", str(folder / "prompts.txt"), "--output", str(folder / output), "--length", "40", *more]


def test_killed_in_the_middle_it_goes_on_where_it_was(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(arguments(run, tmp_path, "one", "--batch-size", "1", "--seed", "3")) == 0
    write, written = prompts_file._write, 0

    def killed(output: Path, lines: str) -> None:
        nonlocal written
        written += 1
        if written > 4:
            write(output, lines[: len(lines) // 2])
            raise KeyboardInterrupt
        write(output, lines)

    monkeypatch.setattr(prompts_file, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(run, tmp_path, "many", "--seed", "3"))
    before = (tmp_path / "many").read_bytes()
    assert 4 <= before.count(b"\n") < len(PROMPTS) and not before.endswith(b"\n")
    monkeypatch.setattr(prompts_file, "_write", write)
    assert main(arguments(run, tmp_path, "many", "--seed", "3", "--no-cache")) == 0
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "many").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS and [line["row"] for line in lines] == list(range(len(PROMPTS)))
    alone = generate_tokens(load_network(run, device="cpu"), prompts=PROMPTS[2:3], length=40, seed=3, first_row=2)
    assert lines[2]["tokens"] == alone.tokens[0].tolist() and lines[2]["stop"] == alone.stops[0]


@pytest.mark.parametrize(
    ("change", "more", "status", "says"),
    [
        (None, ["--seed", "1"], 1, "line 1, is a text of other prompts"),
        ("other", [], 1, "line 2, is a text of other prompts"),
        ("long enough for nothing at all to be left of it", [], 2, "prompt 2 has 47 tokens"),
        (None, ["--prompt", "a"], 2, "neither --prompt, --chat nor --json"),
        (None, ["--batch-size", "0"], 2, "batch size is 0"),
    ],
    ids=str,
)
def test_what_belongs_to_another_command_is_refused(
    change: str | None, more: list[str], status: int, says: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short: list[Any] = ["a", "b"]
    command = arguments(run, tmp_path, "texts.jsonl")
    (tmp_path / "prompts.txt").write_text("\n".join(short))
    assert main(command) == 0
    before = (tmp_path / "texts.jsonl").read_bytes()
    if change is not None:
        short[1] = change
    command[2] = str(tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in short))
    capsys.readouterr()
    assert main([*command, *more]) == status
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert (tmp_path / "texts.jsonl").read_bytes() == before
