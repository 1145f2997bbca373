"""`bd3 prepare` from the command line: what people and scripts get, and what they are told when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bd3_scale.prepare import main


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {number}\n\nsays <|endoftext|> é."}) + "\n" for number in range(300)), "utf-8")
    return path


@pytest.mark.parametrize("kind", ["mds", "webdataset"])
def test_prepare_inspect_verify(kind: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "--source",
        corpus,
        "--path",
        tmp_path / "out",
        "--context",
        32,
        "--tokenizer",
        "bytes",
        "--format",
        kind,
        "--validation",
        0.2,
    ]
    assert run(*command, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["train"]["documents"] + report["validation"]["documents"] == 300 and 30 < report["validation"]["documents"] < 90
    assert report["context"] == 32 and report["format"] == kind and report["source"] == "corpus.jsonl"
    assert run(*command) == 0  # again: the folder is there already
    assert run("--path", tmp_path / "out", "--inspect", 2, "--verify") == 0
    assert "--- train row 1" in (shown := capsys.readouterr().out) and "every file has the size and the hash" in shown
    shard = next((tmp_path / "out" / "train").glob("shard*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert run("--path", tmp_path / "out", "--verify") == 1
    error = capsys.readouterr().err
    assert error.startswith("bd3 prepare: error: ") and shard.name in error and error.count("\n") == 1


def test_plain_text_and_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"line one of {number}\nline two" for number in range(200)) + "\n")
    out = tmp_path / "out"
    assert (
        run(
            "--source",
            tmp_path / "a.txt",
            "--path",
            out,
            "--context",
            16,
            "--tokenizer",
            "bytes",
            "--tokens",
            2000,
            "--json",
            "--inspect",
            1,
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert 1900 < report["train"]["tokens"] + report["validation"]["tokens"] <= 2000
    assert run("--source", tmp_path / "a.txt", "--path", out, "--context", 16, "--tokenizer", "bytes", "--tokens", 3000) == 1
    assert "with --tokens 2000, asked for is --tokens 3000" in capsys.readouterr().err


def test_a_folder_that_is_there_was_prepared_by_the_same_rules(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--source", corpus, "--path", tmp_path / "out", "--context", 64, "--tokenizer", "bytes"]
    assert run(*command, "--validation", "last:50", "--packing", "document", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["validation"]["documents"] == 50 and report["held_out"] == "last:50" and report["packing"] == "document"
    for rules, message in (
        (["--validation", "last:60", "--packing", "document"], "with --validation last:50, asked for is --validation last:60"),
        (["--validation", "last:50"], "with --packing document, asked for is --packing wrap"),
    ):
        assert run(*command, *rules) == 1
        assert message in capsys.readouterr().err
    assert run("--path", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "were cut off" in said and f"{report['train']['filling_share']:.1%} of the positions are filling" in said
    assert run("--source", "documentation", "--validation", "last:5", "--path", tmp_path / "other", "--tokenizer", "bytes") == 2
    assert "has a rule of its own" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_bad_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"content": "b"}\n')
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    (tmp_path / "c.csv").write_text("a,b")
    for name, message in (
        ("a.jsonl", "line 2 is not an object with a string"),
        ("b.jsonl", "line 2 is not UTF-8"),
        ("c.csv", "kind is not known"),
        ("d.txt", "cannot be read"),
    ):
        assert run("--source", tmp_path / name, "--path", tmp_path / "out", "--context", 16, "--tokenizer", "bytes") == 1
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run("--path", tmp_path / "out") == 1
    assert "give --source" in capsys.readouterr().err
