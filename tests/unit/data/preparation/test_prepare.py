"""A data folder is complete or not there, whatever happens to those who make it, and what holds anything is not overwritten."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bd3_scale.data.formats.streaming_compat import import_streaming
from bd3_scale.data.lock import exclusive
from bd3_scale.data.manifest import Manifest
from bd3_scale.data.preparation.packing import Document
from bd3_scale.data.preparation.prepare import Packing, prepare
from bd3_scale.data.tokenizer import ByteTokenizer
from bd3_scale.errors import DataError, RecipeError

PACKING = Packing(ByteTokenizer(), 64, shard_bytes=12_500)


def documents() -> Iterator[Document]:
    for number in range(100):
        yield Document(str(number), np.full(200, number), number % 5 == 0)


def test_a_killed_preparation_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    import_streaming()
    folder = tmp_path / "data"

    def killed() -> Iterator[Document]:
        for number, document in enumerate(documents()):
            if number == 90:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document

    child = os.fork()
    if child == 0:
        try:
            prepare(folder, PACKING, "test", None, killed)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert list(folder.iterdir()) and not (folder / "manifest.json").exists()  # something is left, but it is no data
    manifest = prepare(folder, PACKING, "test", None, documents)
    assert Manifest.load(folder / "manifest.json") == manifest
    assert list(tmp_path.iterdir()) == [folder]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "train", "validation"]


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Document]:
        yield from documents()
        raise DataError("the text ends here")

    before = threading.active_count()
    with pytest.raises(DataError, match="ends here"):
        prepare(tmp_path / "data", PACKING, "test", None, failing)
    assert not list(tmp_path.iterdir()) and threading.active_count() == before


def test_two_at_once_prepare_once(tmp_path: Path) -> None:
    started: list[int] = []
    results: list[Manifest] = []

    def counted() -> Iterator[Document]:
        started.append(1)
        yield from documents()

    threads = [
        threading.Thread(target=lambda: results.append(prepare(tmp_path / "data", PACKING, "test", None, counted))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1 and len(results) == 6 and len({manifest.fingerprint for manifest in results}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_lock_is_held_by_one_at_a_time_and_leaves_no_file(tmp_path: Path) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with exclusive(tmp_path / "lock"):
                with guard:
                    inside += 1
                    most = max(most, inside)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="cannot be created"), exclusive(tmp_path / "none" / "lock"):
        pass


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    for kind in ("mds", "webdataset"):
        packing = Packing(ByteTokenizer(), 64, "bos_eos", kind, 12_500)
        first, second = (prepare(tmp_path / kind / name, packing, "test", 5, documents) for name in "ab")
        assert first == second and first.fingerprint == second.fingerprint
        for file in (tmp_path / kind / "a").rglob("*.*"):
            assert file.read_bytes() == (tmp_path / kind / "b" / file.relative_to(tmp_path / kind / "a")).read_bytes()


def test_what_cannot_become_a_data_folder(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        prepare(tmp_path / "full", PACKING, "test", None, documents)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    with pytest.raises(DataError, match="cannot be created"):
        prepare(tmp_path / "full" / "thesis.tex" / "data", PACKING, "test", None, documents)
    with pytest.raises(DataError, match=r"its validation split has 0 tokens in 0 documents, too few for one row of 64"):
        prepare(tmp_path / "data", PACKING, "test", None, lambda: [Document("a", np.zeros(500, np.int64), False)])
    with pytest.raises(RecipeError, match="shards of 200 bytes"):
        prepare(tmp_path / "data", Packing(ByteTokenizer(), 64, shard_bytes=200), "test", None, documents)
    with pytest.raises(RecipeError, match="packed as wrap only"):
        prepare(tmp_path / "data", Packing(ByteTokenizer(), 64, kind="document"), "test", None, documents)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    prepare(tmp_path / "empty", PACKING, "test", None, documents)  # an empty folder is welcome
