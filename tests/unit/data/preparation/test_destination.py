"""The folder that is prepared: whatever it is; what cannot be written is found first; what is there already is the same, or an error says
what differs."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bd3_scale.data.manifest import Manifest
from tests.unit.data.preparation.test_prepare_tool import run


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder of another file system than pytest's."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


def corpus(path: Path, word: str = "word", key: str = "text") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({key: f"{word} {number}", "other": "x"}) + "\n" for number in range(100)))
    return path


@pytest.mark.parametrize("source", ["documents", "documentation"])
def test_a_link_to_another_file_system_is_a_folder_like_others(source: str, tmp_path: Path, elsewhere: Path) -> None:
    """As a volume that is mounted, its parent cannot be written beside it; a file system may have made a folder of its own."""
    (elsewhere / "lost+found").mkdir()
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "out").symlink_to(elsewhere)
    before = sorted((tmp_path / "parent").iterdir())
    if source == "documents":
        source = str(corpus(tmp_path / "a.jsonl"))
    command = ["--source", source, "--path", tmp_path / "parent" / "out", "--context", 16, "--tokenizer", "bytes", "--tokens", 200_000]
    assert run(*command) == 0 and run("--path", elsewhere, "--verify") == 0
    assert sorted((tmp_path / "parent").iterdir()) == before
    assert sorted(path.name for path in elsewhere.iterdir()) == ["lost+found", "manifest.json", "train", "validation"]


def test_a_folder_that_cannot_be_written_is_found_before_a_document_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bd3_scale.data.preparation import prepare_corpus

    monkeypatch.setattr(prepare_corpus, "corpus_files", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "gone")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "nowhere", tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        assert run("--source", corpus(tmp_path / "a.jsonl"), "--path", path, "--context", 16, "--tokenizer", "bytes") == 1
        error = capsys.readouterr().err
        assert "cannot be created" in error and error.count("\n") == 1


def test_what_is_there_is_the_same_or_the_error_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = corpus(tmp_path / "a.jsonl"), tmp_path / "out"
    (tmp_path / "moved").mkdir()
    command = ["--path", out, "--context", 16, "--tokenizer", "bytes", "--validation", "last:20"]
    assert run("--source", source, *command) == 0
    made = (out / "manifest.json").read_bytes()
    assert run("--source", shutil.copy(source, tmp_path / "moved"), *command) == 0  # the same content elsewhere
    capsys.readouterr()
    same_size = corpus(tmp_path / "other" / "a.jsonl", "wood")
    two = [source, corpus(tmp_path / "b.jsonl")]
    for sources, options, message in (
        ([same_size], [], "source files: 1 of"),
        (two, [], "--source a.jsonl, asked for is --source a.jsonl + b.jsonl"),
        ([source], ["--text-key", "other"], "--text-key text, asked for is --text-key other"),
        ([source], ["--shard-bytes", 10_000], "--shard-bytes 16777216, asked for is --shard-bytes 10000"),
        ([source], ["--skip-bad", 3], "--skip-bad 0, asked for is --skip-bad 3"),
        ([source], ["--format", "webdataset"], "--format mds, asked for is --format webdataset"),
        ([source], ["--row-special", "none"], "--row-special bos, asked for is --row-special none"),
        ([source], ["--context", 32], "--context 16, asked for is --context 32"),
        ([source], ["--tokenizer", "gpt2"], "--tokenizer bytes, asked for is --tokenizer gpt2"),
    ):
        assert run("--source", *sources, *command, *options) == 1
        error = capsys.readouterr().err
        assert message in error and "give another --path" in error and error.count("\n") == 1
    assert (out / "manifest.json").read_bytes() == made
    former = Manifest.load(out / "manifest.json")  # of a folder from before there were options
    (out / "manifest.json").write_bytes(Manifest(**{**vars(former), "options": {}}).to_bytes())
    assert run("--source", same_size, *command) == 0
