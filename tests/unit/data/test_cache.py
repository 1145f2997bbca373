"""A bounded cache: the same rows, never too many bytes, nothing evicted that is in use, the next shards there before they are needed."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bd3_scale.data import cache as module
from bd3_scale.data.cache import Cache
from bd3_scale.data.loader import Loader
from bd3_scale.data.manifest import Manifest
from bd3_scale.data.open import Data, open_data
from bd3_scale.data.preparation.prepare import Packing, prepare
from bd3_scale.data.tokenizer import ByteTokenizer
from bd3_scale.errors import DataError
from bd3_scale.recipe.schema import DataConfig
from tests.unit.data.conftest import random_documents

CONTEXT = 64
BATCH = 16


@pytest.fixture(scope="module")
def remotes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Manifest]]:
    """Format -> (folder of some twenty small training shards, manifest)."""
    made = {}
    for kind in ("mds", "webdataset"):
        folder = tmp_path_factory.mktemp("remote") / kind
        packing = Packing(ByteTokenizer(), CONTEXT, "bos", kind, shard_bytes=9_000)
        made[kind] = folder, prepare(folder, packing, "random", None, lambda: random_documents(1200))
    return made


def opened(folder: Path, kind: str, remote: Path | None, limit: int | None = None, ahead: int = 2, window: int = 2) -> Data:
    config = DataConfig(path=str(folder), format=kind, tokenizer="bytes", window=window, prefetch=1)
    config.remote, config.cache_bytes, config.download_ahead = None if remote is None else str(remote), limit, ahead
    return open_data(config, CONTEXT, leader=True, barrier=lambda: None)


def loader(data: Data) -> Loader:
    return data.loader(5, global_batch=BATCH, micro_batch=BATCH, replica=0, replicas=1)


def settle(loading: Loader) -> None:
    """Wait for the downloads that were begun."""
    assert loading._downloading is not None
    loading._downloading.result(timeout=60)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def shards_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "train").glob("shard*")}


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of the folder at each moment when it is largest: when a file has arrived and its scratch copy is there, too."""
    seen: list[int] = []
    original = Cache._fetch

    def measured(self: Cache, relative: str, local: Path, check: Callable[[Path], str | None]) -> None:
        def checked(path: Path) -> str | None:
            seen.append(size(self.folder))
            return check(path)

        original(self, relative, local, checked)

    monkeypatch.setattr(Cache, "_fetch", measured)
    return seen


@pytest.mark.parametrize("kind", ["mds", "webdataset"])
def test_two_epochs_through_a_small_cache(kind: str, remotes: dict[str, tuple[Path, Manifest]], tmp_path: Path, peak: list[int]) -> None:
    remote, manifest = remotes[kind]
    assert len(manifest.train.shards) > 12
    limit = size(remote) // 2
    steps = range(2 * manifest.train.rows // BATCH)
    with opened(remote, kind, None) as whole, loader(whole) as reference:
        with opened(tmp_path, kind, remote, limit) as data, loader(data) as loading:
            for step in steps:
                wanted, found = (one.micro_batches(step * BATCH)[0].rows for one in (reference, loading))
                assert (wanted == found).all()
        expected = whole.validation.rows(np.arange(len(whole.validation)))
    assert max(peak) <= limit and size(tmp_path) <= limit
    assert len(peak) > len(manifest.train.shards) + 10, "shards were fetched again, so some had been evicted"
    with opened(tmp_path, kind, remote, limit) as data:
        assert (data.validation.rows(np.arange(len(data.validation))) == expected).all()
    smaller = limit // 2
    opened(tmp_path, kind, remote, smaller).close()
    assert size(tmp_path) <= smaller, "a smaller bound holds from the start"


def test_shards_are_there_before_they_are_needed(
    remotes: dict[str, tuple[Path, Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, manifest = remotes["mds"]
    fetched: list[tuple[str, str]] = []
    original = Cache._fetch

    def noted(self: Cache, relative: str, *rest: object) -> None:
        fetched.append((relative, threading.current_thread().name))
        original(self, relative, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Cache, "_fetch", noted)
    with opened(tmp_path, "mds", remote, ahead=3) as data:
        names = [shard.file for shard in manifest.train.shards]
        order = data.order(5)
        with loader(data) as loading:
            loading.micro_batches(0)
            settle(loading)
            now, following = order.shards(0, 2 * BATCH, 3)
            assert len(now) == 2 and len(following) == 3
            assert shards_of(tmp_path) == {names[shard] for shard in now + following}
            fetched.clear()
            for step in range(1, manifest.train.rows // BATCH):
                loading.micro_batches(step * BATCH)
                settle(loading)
            fetched_names = [Path(relative).name for relative, _ in fetched]
            assert sorted(fetched_names) == sorted(set(names) - {names[shard] for shard in now + following})
            assert {thread.rsplit("_", 1)[0] for _, thread in fetched} == {"data-download"}, "nobody had to wait for a shard"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data-")]


def test_what_cannot_be_fetched_ahead_is_an_error_only_when_it_is_needed(remotes: dict[str, tuple[Path, Manifest]], tmp_path: Path) -> None:
    remote = Path(shutil.copytree(remotes["mds"][0], tmp_path / "remote"))
    with opened(tmp_path / "cache", "mds", remote) as data, loader(data) as loading:
        order = data.order(5)
        lost = remotes["mds"][1].train.shards[order.shards(0, 2 * BATCH, 2)[1][0]].file
        content = (remote / "train" / lost).read_bytes()
        (remote / "train" / lost).unlink()
        with pytest.raises(DataError, match=rf"{lost}: cannot be fetched from {remote}"):
            for step in range(len(data.train) // BATCH):
                loading.micro_batches(step * BATCH)
                settle(loading)
        assert step > 2
        (remote / "train" / lost).write_bytes(content)
        loading.micro_batches(step * BATCH)  # it is back: the run could go on


def test_what_another_process_has_open_is_not_evicted(
    remotes: dict[str, tuple[Path, Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flock belongs to the open file, not to the process: two readers here are as two processes."""
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    remote, manifest = remotes["mds"]
    rows = np.cumsum([0, *(shard.rows for shard in manifest.train.shards)])
    others = size(remote) - sum(shard.bytes for shard in (*manifest.train.shards, *manifest.validation.shards))
    limit = others + sum(sorted(shard.bytes for shard in manifest.train.shards)[-3:])
    with opened(remote, "mds", None) as whole:
        expected = whole.train.rows(rows[:6])
    with opened(tmp_path, "mds", remote, limit) as first, opened(tmp_path, "mds", remote, limit) as second:
        assert (first.train.rows(rows[[0, 1]]) == expected[[0, 1]]).all()
        for shard in (2, 3, 4, 5, 2):  # one place is left, which each takes from the one before
            assert (second.train.rows(rows[[shard]]) == expected[[shard]]).all()
            assert {manifest.train.shards[held].file for held in (0, 1, shard)} == shards_of(tmp_path)
        third = opened(tmp_path, "mds", remote, limit)
        with pytest.raises(DataError, match=rf"{manifest.train.shards[3].file}: needs \d+ bytes, but shards in use fill data.cache_bytes"):
            third.train.rows(rows[[3]])
        (tmp_path / "train" / manifest.train.shards[0].file).unlink()  # somebody who knows nothing of this
        assert (first.train.rows(rows[[0]]) == expected[0]).all(), "an open file is read to its end"
        threading.Timer(0.1, second.train.close).start()
        monkeypatch.setattr(module, "PATIENCE", 30.0)
        first.train.close()
        assert (third.train.rows(rows[[3]]) == expected[3]).all(), "it waits for room"
        third.close()


def test_a_bound_that_is_too_small_is_refused_at_the_start(remotes: dict[str, tuple[Path, Manifest]], tmp_path: Path) -> None:
    remote, manifest = remotes["webdataset"]
    with opened(tmp_path, "webdataset", remote, size(remote) // 8) as data, pytest.raises(DataError) as error:
        loader(data)
    enough = int(str(error.value).split("set data.cache_bytes=")[1].split()[0])
    assert manifest.train.shards[0].bytes * 4 < enough < size(remote) // 2 and "\n" not in str(error.value)
    with opened(tmp_path, "webdataset", remote, enough) as data, loader(data) as loading:
        start = time.monotonic()
        for step in range(3 * manifest.train.rows // BATCH):
            loading.micro_batches(step * BATCH)
        assert time.monotonic() - start < module.PATIENCE, "what is said to be enough is: nobody waits for room"
    assert size(tmp_path) <= enough


def test_the_manifest_and_indexes_stay(remotes: dict[str, tuple[Path, Manifest]], tmp_path: Path) -> None:
    remote = remotes["mds"][0]
    opened(tmp_path, "mds", remote).close()
    Cache(tmp_path, str(remote), 10).manifest()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")} == {
        "manifest.json",
        "train/index.json",
        "validation/index.json",
    }


def test_only_a_copy_of_the_remote_is_ever_deleted(remotes: dict[str, tuple[Path, Manifest]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(remotes["mds"][0], tmp_path / "data"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(folder)
    for remote, message in ((folder, "is data.remote itself"), (tmp_path / "link", "is data.remote itself")):
        with pytest.raises(DataError, match=message):
            opened(folder, "mds", remote, 1000)
    with pytest.raises(DataError, match="holds other data than"):
        opened(folder, "mds", remotes["webdataset"][0], 1000)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written_is_an_error_for_people(remotes: dict[str, tuple[Path, Manifest]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/cache: cannot be written \(.*Not a directory"):
        opened(tmp_path / "file" / "cache", "mds", remotes["mds"][0])
