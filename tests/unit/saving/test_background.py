"""Background saves: what is written is the state of the call, errors reach every rank, patience ends, `latest` is never wrong."""

from __future__ import annotations

import errno
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from bd3_scale.checkpoint import store
from bd3_scale.errors import CheckpointError
from bd3_scale.recipe.schema import CheckpointConfig
from bd3_scale.saving import background, fetch, remote
from bd3_scale.saving.background import Saver


def begin(synthetic: Any, saver: Saver, step: int, owned: Any, state: Any = None) -> list[Any]:
    fragments = synthetic.fragments(owned, state or synthetic.full_state())
    saver.save(step, fragments, samples_consumed=step * 8, run=synthetic.RUN, recipe=synthetic.RECIPE)
    return fragments


class Held:
    """Holds writers back until `go` is set; optionally fails them on one rank."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: str | None = None) -> None:
        self.go, self.failing, self.error = threading.Event(), failing, OSError(errno.ENOSPC, "No space left on device")
        write = store.write_shard

        def write_shard(path: Path, fragments: Any) -> Any:
            assert self.go.wait(20)
            if self.failing is not None and self.failing in path.name:
                raise self.error
            return write(path, fragments)

        monkeypatch.setattr(store, "write_shard", write_shard)


def test_training_goes_on_and_the_files_are_those_of_a_blocking_save(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = synthetic.save(tmp_path / "blocking", "flat2")
    held = Held(monkeypatch)
    owned = synthetic.LAYOUTS["flat2"]
    begun = threading.Barrier(2, timeout=20)

    def rank(member: Any) -> Path | None:
        saver = Saver(tmp_path / "run", CheckpointConfig(), member, channel=member)
        fragments = begin(synthetic, saver, 100, owned[member.rank])
        for fragment in fragments:
            fragment.value.zero_()  # the next step changes everything
        begun.wait()
        assert store.find_latest(tmp_path / "run") is None
        held.go.set()
        saver.close()
        return saver.published

    assert synthetic.in_world(2, rank) == [tmp_path / "run" / "step_00000100"] * 2
    assert synthetic.holds(store.find_latest(tmp_path / "run"))
    for path in expected.iterdir():
        assert path.read_bytes() == (tmp_path / "run" / expected.name / path.name).read_bytes()


def test_host_memory_is_reused_and_a_second_save_waits_for_the_first(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    said: list[str] = []
    saver = Saver(tmp_path, CheckpointConfig(keep=2, keep_every=200), say=said.append)
    begin(synthetic, saver, 100, synthetic.whole())
    memory = saver._host._room[0].data_ptr()
    threading.Timer(0.2, held.go.set).start()
    begin(synthetic, saver, 200, synthetic.whole(), synthetic.full_state(1))
    assert "step 200: waited" in said[0] and "step 100" in said[0]
    assert saver.published == tmp_path / "step_00000100" and saver._host._room[0].data_ptr() == memory
    for step in (300, 400, 500):
        begin(synthetic, saver, step, synthetic.whole(), synthetic.full_state(2))
    saver.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000200", "step_00000400", "step_00000500"]
    assert synthetic.holds(tmp_path / "step_00000200", 1) and synthetic.holds(store.find_latest(tmp_path), 2)


def test_host_memory_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory is rounded up to a power of two: of one large allocation up to as much again would be lost."""
    monkeypatch.setattr(background, "PIECE", 10)
    values = background._host_memory([4, 6, 3, 25, 0, 2, 8], pinned=False)
    assert [len(value) for value in values] == [4, 6, 3, 25, 0, 2, 8] and all(value.is_contiguous() for value in values)
    assert [value.untyped_storage().nbytes() // 4 for value in values] == [10, 10, 3, 25, 10, 10, 10]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_all_ranks_tolerate_the_full_disk_of_one_until_patience_ends(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    synthetic.save(tmp_path, "flat2", 50)
    held = Held(monkeypatch, failing="state-00001")
    held.go.set()
    warnings: list[list[tuple[int, str]]] = [[], []]

    def rank(member: Any) -> tuple[int, str]:
        config = CheckpointConfig(patience=2, asynchronous=asynchronous)
        saver = Saver(tmp_path, config, member, channel=member, warn=lambda *warning: warnings[member.rank].append(warning))
        for step in (100, 200, 300, 400):
            try:
                begin(synthetic, saver, step, synthetic.LAYOUTS["flat2"][member.rank])
                saver.wait()
            except CheckpointError as error:
                return step, str(error)
        return 0, ""

    answers = synthetic.in_world(2, rank)
    assert answers[0] == answers[1] and answers[0][0] == 300, answers
    assert "rank 1: No space left on device; free space" in answers[0][1] and "checkpoint.patience is 2" in answers[0][1]
    assert [step for step, _ in warnings[0]] == [100, 200, 300] and "No space left" in warnings[0][0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000050"]
    assert synthetic.holds(store.find_latest(tmp_path))


def test_a_success_restores_patience_but_the_last_save_must_succeed(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    held.go.set()
    saver = Saver(tmp_path, CheckpointConfig(patience=1))
    for step, failing in ((1, "state"), (2, None), (3, "state"), (4, None), (5, "state")):
        held.failing = failing
        begin(synthetic, saver, step, synthetic.whole())
        if step < 5:
            saver.wait()
    with pytest.raises(CheckpointError, match="step_00000005 could not be saved: No space left"):
        saver.close()
    assert store.find_latest(tmp_path) == tmp_path / "step_00000004"


def test_a_defect_is_never_tolerated(synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, failing="state")
    held.error = ZeroDivisionError("defect")  # type: ignore[assignment]
    held.go.set()
    saver = Saver(tmp_path, CheckpointConfig(patience=9))
    begin(synthetic, saver, 1, synthetic.whole())
    with pytest.raises(CheckpointError, match="ZeroDivisionError: defect"):
        saver.wait()
    monkeypatch.setattr(background.store, "save", lambda *_, **__: 1 / 0)
    begin(synthetic, saver, 2, synthetic.whole())
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    with pytest.raises(CheckpointError, match="JSON"):
        saver.save(3, [], samples_consumed=0, run={"x": float("nan")}, recipe="")


def test_remote_folder_gets_whole_checkpoints_and_latest_last(synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{tmp_path.name}-{id(tmp_path)}"
    filesystem, root = fsspec.core.url_to_fs(url)
    order: list[str] = []
    put, pipe, trouble = filesystem.put_file, filesystem.pipe_file, [OSError("reset"), OSError("reset")]

    def put_file(local: str, path: str, **options: Any) -> None:
        if trouble:
            raise trouble.pop()
        order.append(path.rsplit("/", 1)[1])
        put(local, path, **options)

    def pipe_file(path: str, value: bytes, **options: Any) -> None:
        order.append(path.rsplit("/", 1)[1])
        pipe(path, value, **options)

    monkeypatch.setattr(type(filesystem), "put_file", lambda self, *a, **o: put_file(*a, **o))
    monkeypatch.setattr(type(filesystem), "pipe_file", lambda self, *a, **o: pipe_file(*a, **o))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    warnings: list[str] = []
    saver = Saver(tmp_path / "run", CheckpointConfig(remote=url), warn=lambda step, text: warnings.append(text))
    begin(synthetic, saver, 100, synthetic.whole())
    saver.close(upload_seconds=20)
    assert order[-2:] == ["index.json", "latest"] and not warnings
    assert filesystem.cat_file(f"{root}/latest") == b"step_00000100\n"
    filesystem.get(f"{root}/step_00000100", str(tmp_path / "back"), recursive=True)
    shutil.move(tmp_path / "back", tmp_path / "step_00000100")
    assert synthetic.holds(tmp_path / "step_00000100")


def test_a_remote_folder_that_is_gone_only_warns(synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    (tmp_path / "file").write_text("no folder")
    warnings: list[str] = []
    config = CheckpointConfig(remote=f"file://{tmp_path}/file/bucket")
    saver = Saver(tmp_path / "run", config, warn=lambda step, text: warnings.append(text))
    begin(synthetic, saver, 100, synthetic.whole())
    saver.close(upload_seconds=20)
    assert len(warnings) == 1 and "step_00000100: it could not be uploaded" in warnings[0]
    assert synthetic.holds(store.find_latest(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"checkpoint\.remote=nonsense://x"):
        Saver(tmp_path, CheckpointConfig(remote="nonsense://x"))


def test_no_line_shows_what_gives_access(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither ours, nor what a store's client says of the address that it was given."""
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    url = "memory://user:p@ssword@bucket/run?signature=secret"

    def refuse(*_: Any) -> None:
        raise PermissionError(f"403, url='{url}'")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    warnings: list[str] = []
    path = synthetic.save(tmp_path / "run")
    for leads in (True, False):
        uploader = remote.Uploader(url, warnings.append, leads=leads)
        uploader.offer(path, [])
        uploader.close(20)
    with pytest.raises(CheckpointError) as error:
        fetch.fetch_latest(url, tmp_path / "new")
    said = [*warnings, caplog.text, str(error.value)]
    assert all("403" in text and "bucket/run" in text for text in said)
    assert not any(word in text for text in said for word in ("ssword", "user", "secret"))


def test_what_is_old_at_the_remote_folder_goes_by_number(tmp_path: Path) -> None:
    """As texts, step 99,999,999 comes after 100,000,000."""
    for step in (99_999_998, 99_999_999, 100_000_000, 100_000_001):
        (tmp_path / store.step_name(step)).mkdir()
        (tmp_path / store.step_name(step) / "index.json").touch()
    (tmp_path / "latest").write_text("step_100000000\n")
    remote.prune(f"file://{tmp_path}", 2, 0)
    left = {path.name for path in tmp_path.glob("step_*")}
    assert left == {"step_99999999", "step_100000000", "step_100000001"}, "the last is of a run that was set back"


class LikeS3(LocalFileSystem):
    """Local files behind the signature that s3fs has for reading a part of one."""

    protocol = "like-s3"

    def cat_file(self, path: str, version_id: None = None, start: int | None = None, end: int | None = None) -> bytes:
        assert version_id is None
        return super().cat_file(path, start=start, end=end)


fsspec.register_implementation("like-s3", LikeS3)


@pytest.mark.parametrize("protocol", ["file", "like-s3"])
def test_a_new_machine_continues_from_the_remote_folder(synthetic: Any, tmp_path: Path, protocol: str) -> None:
    bucket = tmp_path / "bucket"
    url = f"{protocol}://{bucket}"
    assert fetch.fetch_latest(url, tmp_path / "new") is None and not (tmp_path / "new").exists()
    saver = Saver(tmp_path / "run", CheckpointConfig(remote=url))
    begin(synthetic, saver, 100, synthetic.whole())
    saver.close(upload_seconds=20)
    found = fetch.fetch_latest(url, tmp_path / "new")
    assert found == tmp_path / "new" / "step_00000100" == store.find_latest(tmp_path / "new")
    assert synthetic.holds(found)


def test_a_step_that_is_saved_again_is_whole_only_when_it_is_there_again(synthetic: Any, tmp_path: Path) -> None:
    """Names and sizes are those of the files that stand there; their content is not."""
    folder, url = tmp_path / "run", f"file://{tmp_path / 'bucket'}"

    def upload() -> None:
        remote.put(path, url, sorted(file.name for file in path.iterdir() if file.name != "index.json"))

    path = synthetic.save(folder, seed=0)
    upload()
    assert remote.missing(path, url) == []
    assert synthetic.save(folder, seed=1) == path and len(remote.missing(path, url)) == 2, "both ranks' files are others now"
    upload()
    assert remote.missing(path, url) == []


def test_every_rank_uploads_its_own_and_fetches_a_share(synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 alone would take a thousand times as long, and all others would wait for it in one collective."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    bucket, owned = tmp_path / "bucket", synthetic.LAYOUTS["zero3 on 4"]
    config, moved = CheckpointConfig(remote=f"file://{bucket}", remote_keep=1, keep_every=200), list[tuple[str, int]]()
    put, cat = LocalFileSystem.put_file, LocalFileSystem.cat_file

    def put_file(self: Any, local: str, path: str, **options: Any) -> None:
        moved.append((Path(path).name, threading.get_ident()))
        put(self, local, path, **options)

    def cat_file(self: Any, path: str, **span: int) -> bytes:
        moved.append((Path(path).name, threading.get_ident()))
        return cat(self, path, **span)

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)
    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_file)
    for step in (100, 200, 300, 400):

        def train(member: Any, step: int = step) -> None:
            saver = Saver(tmp_path / "run", config, member, channel=member)
            begin(synthetic, saver, step, owned[member.rank])
            saver.close(upload_seconds=20)

        moved.clear()
        assert synthetic.in_world(4, train) == [None] * 4
        assert len({thread for name, thread in moved if name.startswith("state")}) == 4 and moved[-1][0] in ("index.json", "latest")
    assert {path.name for path in bucket.iterdir()} == {"latest", "step_00000200", "step_00000400"}, "remote_keep and keep_every"
    moved.clear()
    beats: list[tuple[int, int]] = []
    new = tmp_path / "new"
    results = synthetic.in_world(3, lambda member: fetch.fetch_latest(f"file://{bucket}", new, member, lambda *both: beats.append(both)))
    assert results == [new / "step_00000400"] * 3 and synthetic.holds(results[0])
    assert len({thread for name, thread in moved if name.startswith("state")}) == 3
    assert beats and all(done == total for done, total in beats[-3:])


def test_a_broken_fetch_goes_on_where_it_ended(synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "BLOCK", 64)
    monkeypatch.setattr(fetch, "PAUSE", 0.001)
    synthetic.save(tmp_path / "bucket", "flat3")
    asked: list[tuple[str, int]] = []
    cat, allowed = LocalFileSystem.cat_file, [60]

    def cat_file(self: Any, path: str, start: int = 0, end: int = 0) -> bytes:
        if path.endswith("safetensors"):
            if not allowed[0]:
                raise ConnectionResetError("the network is gone")
            allowed[0] -= 1
            asked.append((Path(path).name, start))
        return cat(self, path, start, end)

    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_file)

    def new(member: Any) -> Path | None:
        return fetch.fetch_latest(f"file://{tmp_path / 'bucket'}", tmp_path / "new", member)

    results = synthetic.in_world(2, new)
    assert all(isinstance(error, CheckpointError) and "the network is gone" in str(error) for error in results), results
    assert store.find_latest(tmp_path / "new") is None
    allowed[0] = 10**6
    assert synthetic.in_world(2, new) == [tmp_path / "new" / "step_00000100"] * 2 and synthetic.holds(tmp_path / "new" / "step_00000100")
    assert len(asked) == len(set(asked)) > 60, "nothing was fetched twice"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["latest", "step_00000100"]


@pytest.mark.parametrize("damage", ["a byte", "a file", "the index", "a foreign name in latest", "a foreign name in the index"])
def test_a_damaged_remote_checkpoint_is_not_taken_in(synthetic: Any, tmp_path: Path, damage: str) -> None:
    bucket = tmp_path / "bucket"
    saver = Saver(tmp_path / "run", CheckpointConfig(remote=f"file://{bucket}"))
    begin(synthetic, saver, 100, synthetic.whole())
    saver.close(upload_seconds=20)
    state, index = next((bucket / "step_00000100").glob("*.safetensors")), bucket / "step_00000100" / "index.json"
    if damage == "a byte":
        state.write_bytes(state.read_bytes()[:-1] + b"\x55")
    elif damage == "a file":
        state.unlink()
    elif damage == "the index":
        index.write_bytes(index.read_bytes()[:-20])
    elif damage == "a foreign name in latest":
        (bucket / "latest").write_text("../step_00000100\n")
    else:
        (bucket / "outside").write_text("x")
        index.write_text(index.read_text().replace(state.name, "../outside"))
    with pytest.raises(CheckpointError, match=re.escape(f"file://{bucket}")):
        fetch.fetch_latest(f"file://{bucket}", tmp_path / "new")
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())
    assert not (tmp_path / "outside").exists()
