"""A corpus becomes the same folder by any number of processes and through any kill; nothing of it is lost, nothing doubled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from bd3_scale.data.formats.row_reader import ShardReader
from bd3_scale.data.manifest import Manifest
from bd3_scale.data.preparation import destination, tokenization
from bd3_scale.data.preparation.prepare import Packing
from bd3_scale.data.preparation.prepare_corpus import Corpus, prepare_corpus
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.errors import DataError, RecipeError

ROOT = Path(__file__).parents[4]
BYTES = load_tokenizer("bytes")


def write(path: Path, count: int = 400) -> Path:
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abcdefgh "), random.integers(0, 200))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def rows_of(folder: Path, split: str, context: int, tokenizer: str = "bytes") -> np.ndarray:
    with ShardReader(folder, split, context=context, tokenizer=load_tokenizer(tokenizer)) as reader:
        return reader.rows(range(len(reader)))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def streams(path: Path, is_held_out: Callable[[int], bool]) -> dict[str, list[int]]:
    """What the rows must hold, written down plainly."""
    result: dict[str, list[int]] = {"train": [], "validation": []}
    for number, line in enumerate(path.read_text().splitlines()):
        result["validation" if is_held_out(number) else "train"] += [*json.loads(line)["text"].encode(), BYTES.end_of_text]
    return result


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "CHUNK_BYTES", 3000)


@pytest.mark.parametrize("form", ["mds", "webdataset"])
@pytest.mark.parametrize("special", ["none", "bos", "bos_eos"])
def test_rows_are_the_corpus(form: str, special: str, tmp_path: Path) -> None:
    corpus = write(tmp_path / "a.jsonl")
    packing = Packing(BYTES, 33, special, form, shard_bytes=9000)
    manifest = prepare_corpus(tmp_path / "out", packing, Corpus((str(corpus),), held_out_last=60), workers=1, progress=False)
    first, last = (0, 33) if special == "none" else (1, 33 - (special == "bos_eos"))
    for name, stream in streams(corpus, lambda number: number >= 340).items():
        rows, split = rows_of(tmp_path / "out", name, 33), manifest.split(name)
        payload = rows[:, first:last].ravel().tolist()
        assert payload == stream[: len(payload)] and split.tokens == len(stream) == len(payload) + split.dropped_tokens
        assert split.dropped_tokens < last - first and split.documents == (60 if name == "validation" else 340)
        assert len(split.shards) > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
    assert Manifest.load(tmp_path / "out" / "manifest.json") == manifest


@pytest.mark.parametrize("form", ["mds", "webdataset"])
@pytest.mark.parametrize("special", ["none", "bos", "bos_eos"])
def test_a_document_a_row(form: str, special: str, tmp_path: Path) -> None:
    """Its end counts, what fills the row behind it does not, and readers say how much counts without opening a shard."""
    corpus = write(tmp_path / "a.jsonl")
    packing = Packing(BYTES, 64, special, form, shard_bytes=9000 + 8192, kind="document")
    manifest = prepare_corpus(tmp_path / "out", packing, Corpus((str(corpus),), held_out_last=60), workers=1, progress=False)
    texts = [json.loads(line)["text"].encode() for line in corpus.read_text().splitlines()]
    rows, payload = rows_of(tmp_path / "out", "train", 64), packing.packer.payload
    assert len(rows) == 340 and len(manifest.train.shards) > 1
    end, filling = BYTES.end_of_text, 0
    for row, text in zip(rows, texts, strict=False):
        document = [*text, end][:payload]
        fill = [~end] * (payload - len(document))
        filling += len(fill)
        last = [] if special != "bos_eos" else fill[-1:] or [end]
        assert row.tolist() == [*([end] if special != "none" else []), *document, *fill, *last]
    assert manifest.train.dropped_tokens == sum(max(0, len(text) + 1 - payload) for text in texts[:340])
    assert manifest.train.filling == filling > 0 and Manifest.load(tmp_path / "out" / "manifest.json") == manifest
    with ShardReader(tmp_path / "out", "train", context=64, tokenizer=BYTES) as reader:
        assert reader.counts(np.array([5, 0, 5])).tolist() == (rows[[5, 0, 5], 1:] >= 0).sum(1).tolist()
    (tmp_path / "out" / "train" / "counts.u32").write_bytes(b"\1" * 4 * 340)
    with pytest.raises(DataError, match=r"counts\.u32: is damaged"):
        ShardReader(tmp_path / "out", "train", context=64, tokenizer=BYTES)


def test_documents_whole_together(tmp_path: Path) -> None:
    """Every token of `best_fit` is in one row, documents that fit are whole, and hardly any position is filling."""
    corpus = write(tmp_path / "a.jsonl")
    packing = Packing(BYTES, 128, "bos", kind="best_fit")
    manifest = prepare_corpus(tmp_path / "out", packing, Corpus((str(corpus),), held_out_last=60), workers=1, progress=False)
    texts = [json.loads(line)["text"].encode() for line in corpus.read_text().splitlines()][:340]
    rows = rows_of(tmp_path / "out", "train", 128)
    found = [row[1:][row[1:] >= 0].tolist() for row in rows]
    ends = [bytes(part) for row in found for part in _split(row, BYTES.end_of_text)]
    assert sorted(part for part in ends if len(part) < 127) == sorted(
        [t for t in texts if len(t) < 127] + [t[127:] for t in texts if len(t) >= 127]
    )
    assert sum(map(len, found)) == manifest.train.tokens and manifest.train.dropped_tokens == 0
    assert manifest.train.filling == (rows[:, 1:] < 0).sum() < 0.05 * rows.size
    for again in (1, 2):
        other = prepare_corpus(tmp_path / f"again{again}", packing, Corpus((str(corpus),), held_out_last=60), workers=again, progress=False)
        assert content(tmp_path / "out") == content(tmp_path / f"again{again}") and other == manifest


def _split(tokens: list[int], end: int) -> list[list[int]]:
    """What stands between ends, without a last empty one."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts if parts[-1] else parts[:-1]


def test_what_is_held_out(tmp_path: Path) -> None:
    corpus, other = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", 50)
    packing = Packing(BYTES, 16)

    def documents(name: str, **rule: object) -> tuple[int, int]:
        made = prepare_corpus(tmp_path / name, packing, Corpus((str(corpus),), **rule), workers=1, progress=False)  # type: ignore[arg-type]
        return made.train.documents, made.validation.documents

    train, held = documents("share", held_out=0.25)
    assert train + held == 400 and 60 < held < 140
    assert documents("last", held_out_last=7) == (393, 7)
    assert documents("file", held_out_sources=(str(other),)) == (400, 50)
    some = prepare_corpus(tmp_path / "some", packing, Corpus((str(corpus),), tokens=5000), workers=1, progress=False)
    assert 4700 < some.train.tokens + some.validation.tokens <= 5000 and some.held_out == "0.04 by a hash of the text"
    both = Corpus((str(corpus),), held_out_sources=(str(other),), tokens=5000)  # the budget is that of training
    limited = prepare_corpus(tmp_path / "limited", packing, both, workers=1, progress=False)
    assert 4700 < limited.train.tokens <= 5000 and limited.validation.documents == 50 and limited.held_out == "b.jsonl"
    for twice in (Corpus((str(corpus),), held_out_sources=(str(corpus),)), Corpus((str(corpus), str(tmp_path / "*.jsonl")))):
        with pytest.raises(DataError, match="in the corpus twice"):
            prepare_corpus(tmp_path / "twice", packing, twice, workers=1, progress=False)
    with pytest.raises(RecipeError, match="workers is 0"):
        prepare_corpus(tmp_path / "none", packing, Corpus((str(corpus),)), workers=0, progress=False)


def test_an_unfinished_preparation_with_other_options_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, asked = write(tmp_path / "a.jsonl"), Corpus((str(tmp_path / "a.jsonl"),))
    whole = tokenization._write
    made: list[Path] = []

    def stops(path: Path, *rest: object) -> int:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(path)
        return whole(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenization, "_write", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(tmp_path / "out", Packing(BYTES, 16), asked, workers=1, progress=False)
    monkeypatch.setattr(tokenization, "_write", lambda path, *rest: made.append(path) or whole(path, *rest))
    with pytest.raises(DataError, match=r"another context.*--restart"):
        prepare_corpus(tmp_path / "out", Packing(BYTES, 32), asked, workers=1, progress=False)
    made[0].write_bytes(made[0].read_bytes()[:-30])  # a chunk that is damaged is made again, the two others are kept
    prepare_corpus(tmp_path / "out", Packing(BYTES, 16), asked, workers=1, progress=False)
    assert made.count(made[0]) == 2 and len(made) == len(set(made)) + 1
    (tmp_path / "late" / ".preparing" / "tokens").mkdir(parents=True)
    (tmp_path / "late" / ".preparing" / "tokens" / "chunk-000000.npz").write_bytes(b"?")
    (tmp_path / "late" / ".preparing" / "options.json").write_text("{")
    with pytest.raises(DataError, match=r"options.json, which is damaged.*--restart"):
        prepare_corpus(tmp_path / "late", Packing(BYTES, 16), asked, workers=1, progress=False)
    prepare_corpus(tmp_path / "late", Packing(BYTES, 16), asked, workers=1, restart=True, progress=False)
    assert content(tmp_path / "out") == content(tmp_path / "late")
    prepare_corpus(tmp_path / "again", Packing(BYTES, 16), Corpus((str(corpus),)), workers=1, progress=False)
    assert content(tmp_path / "out") == content(tmp_path / "again")


@pytest.mark.parametrize("form", ["mds", "webdataset"])
def test_a_kill_in_the_last_moments_costs_nothing_but_what_was_damaged(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While all is flushed to the disk, which takes minutes for a large folder; and between the renaming and the clearing up."""
    asked, packing = Corpus((str(write(tmp_path / "a.jsonl")),), held_out_last=60), Packing(BYTES, 33, "bos", form, shard_bytes=9000)

    def again() -> Manifest:
        return prepare_corpus(tmp_path / "out", packing, asked, workers=1, progress=False)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(destination, "flush", killed)
        with pytest.raises(KeyboardInterrupt):
            again()
    scratch = tmp_path / "out" / ".preparing"
    shards = sorted((scratch / "data").glob("*/shard*"))
    before = {path: path.stat().st_mtime_ns for path in [*shards, *(scratch / "tokens").glob("chunk-*")]}
    assert len(shards) > 4
    shards[1].write_bytes(shards[1].read_bytes()[:-1] + b"?")
    entry = sorted((scratch / "entries").iterdir())[3]
    entry.write_bytes(entry.read_bytes().replace(b'"rows"', b'"rowz"'))
    with monkeypatch.context() as patched:
        patched.setattr(destination, "sync_directory", killed)  # half of it has its name
        changed: list[Path] = []
        patched.setattr(destination, "flush", lambda _: changed.extend(p for p, made in before.items() if p.stat().st_mtime_ns != made))
        with pytest.raises(KeyboardInterrupt):
            again()
    assert set(changed) == {shards[1], shards[3]}
    with monkeypatch.context() as patched:
        patched.setattr(destination.shutil, "rmtree", killed)  # it is complete, nothing is cleared up
        with pytest.raises(KeyboardInterrupt):
            again()
    assert scratch.exists() and again() == Manifest.load(tmp_path / "out" / "manifest.json") and not scratch.exists()
    prepare_corpus(tmp_path / "plain", packing, asked, workers=1, progress=False)
    assert content(tmp_path / "out") == content(tmp_path / "plain")


def real_text(path: Path, size: int) -> Path:
    """`size` bytes of the sources and documents of the installed packages, a file a document."""
    written = 0
    with path.open("w") as out:
        for file in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
            text = file.read_text("utf-8", errors="ignore")
            written += len(text)
            out.write(json.dumps({"text": text}) + "\n")
            if written > size:
                break
    return path


def test_real_text_through_two_kills(tmp_path: Path) -> None:
    """GPT-2 tokens, MDS and tar, 1 and 2 processes, kill -9 while tokenizing and while writing: the same rows."""
    corpus = real_text(tmp_path / "real.jsonl", 17_000_000)
    common = ["--source", str(corpus), "--context", "1024", "--row-special", "bos_eos", "--validation", "last:50"]
    common += ["--shard-bytes", "1000000", "--json"]

    def start(name: str, *options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "bd3_scale.prepare", "--path", str(tmp_path / name), *common, *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )

    def finish(process: subprocess.Popen) -> None:
        error = process.communicate(timeout=300)[1].decode()
        assert process.returncode == 0, error[-2000:]

    def kill_when(process: subprocess.Popen, pattern: str, count: int) -> None:
        """Only the process that was started, as the kernel does where memory runs out: its workers must go by themselves."""
        while len(list((tmp_path / "killed" / ".preparing").glob(pattern))) < count:
            assert process.poll() is None, "it was finished before it could be killed"
            time.sleep(0.005)
        workers = psutil.Process(process.pid).children()
        process.kill()
        process.communicate()
        assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=60)[1]

    kill_when(start("killed", "--workers", "2"), "tokens/chunk-*", 2)
    tokens = {path: path.stat().st_mtime_ns for path in (tmp_path / ".killed.resumable" / "tokens").glob("chunk-*")}
    kill_when(start("killed", "--workers", "2"), "entries/train-*", 2)
    assert all(path.stat().st_mtime_ns == time_made for path, time_made in tokens.items()), "finished work was done again"
    finish(start("killed", "--workers", "1"))
    finish(start("tar", "--workers", "2", "--format", "webdataset"))
    finish(start("plain", "--workers", "1"))
    assert content(tmp_path / "killed") == content(tmp_path / "plain")
    tokenizer = load_tokenizer("gpt2")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for split, part in (("train", texts[:-50]), ("validation", texts[-50:])):
        rows = rows_of(tmp_path / "plain", split, 1024, "gpt2")
        assert np.array_equal(rows, rows_of(tmp_path / "tar", split, 1024, "gpt2"))
        stream = np.array([token for ids in tokenizer.encode_batch(part) for token in (*ids, tokenizer.end_of_text)])
        kept = len(stream) // 1022 * 1022
        assert np.array_equal(rows[:, 1:-1].ravel(), stream[:kept])
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
