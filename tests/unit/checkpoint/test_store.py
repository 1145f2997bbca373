"""Folders: whole or not there, at any crash and any error; found, kept and deleted by rule."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bd3_scale.checkpoint import shard_files, store
from bd3_scale.errors import CheckpointError


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def on_rank(rank: int, action: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`action` in the thread of a rank, `original` in all others."""

    def choose(*arguments: Any, **named: Any) -> Any:
        return (action if threading.current_thread().name == f"rank{rank}" else original)(*arguments, **named)

    return choose


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


CRASHES = """
import json, os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
from bd3_scale.checkpoint import shard_files, store
work, results = Path(sys.argv[2]), {}

def die_at(moment):
    # Every call that changes the disk, and every sixth tensor written, is a moment; the process ends just before it.
    left, tensors = [moment], [0]
    def wrap(owner, name, every=1):
        original = getattr(owner, name)
        def call(*arguments, **named):
            tensors[0] += 1
            if tensors[0] % every == 0:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
            return original(*arguments, **named)
        setattr(owner, name, call)
    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
        wrap(os, name)
    wrap(shard_files, "_little_endian", 6)

for scenario, step in (("first", 100), ("next", 200), ("again", 100)):
    base = work / scenario
    base.mkdir()
    if scenario != "first":
        conftest.save(base, "flat2", 100, seed=0)
    moment, moved = 0, False
    while True:
        moment += 1
        folder = work / f"{scenario}-{moment}"
        shutil.copytree(base, folder)
        child = os.fork()
        if child == 0:
            try:
                die_at(moment)
                conftest.save(folder, "tensor2", step, seed=1)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), status
        found = store.find_latest(folder)
        new = found is not None and conftest.holds(found, 1)
        old = scenario == "first" and found is None or found is not None and conftest.holds(found, 0)
        assert new or old, (scenario, moment, found)
        assert new or not moved, "latest went back"
        assert status == 9 or new and found == folder / f"step_{step:08d}"
        moved = new
        # The next save finds everything in order, and leaves nothing of the crash.
        conftest.save(folder, "one", 300, seed=2)
        assert conftest.holds(store.find_latest(folder), 2)
        names = sorted(path.name for path in folder.iterdir())
        kept = {"first": {"step_00000100"}, "next": {"step_00000100", "step_00000200"}, "again": {"step_00000100"}}[scenario]
        assert set(names) <= kept | {"latest", "step_00000300"}, names
        assert scenario == "first" or conftest.holds(folder / "step_00000100", 1 if new and scenario == "again" else 0)
        shutil.rmtree(folder)
        if status == 0:
            break
    results[scenario] = moment
print(json.dumps(results))
"""


def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The process is ended (no clean-up, no exception) before every single change of the disk during a save."""
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    moments = json.loads(done.stdout)
    assert all(count > 12 for count in moments.values()), moments


def test_everything_is_on_the_disk_before_it_gets_its_name(synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def traced_replace(source: Path, target: Path) -> None:
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    folder = tmp_path / "checkpoints"
    synthetic.save(folder, "flat3")
    renamed, pointed = events.index(("rename", "step_00000100")), events.index(("rename", "latest"))
    before = [name for what, name in events[:renamed] if what == "sync"]
    files = {path.name for path in (folder / "step_00000100").iterdir()}
    assert files <= set(before)
    assert before[-2] == "index.json"
    assert before[-1].startswith("step_00000100.tmp-")
    assert ("sync", "checkpoints") in events[renamed:pointed]
    assert events[pointed - 1][0] == "sync"
    assert events[pointed - 1][1].startswith("latest.tmp-")
    assert events[-1] == ("sync", "checkpoints")


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("step", [100, 200])
@pytest.mark.parametrize(
    ("owner", "name", "text"),
    [(os, "fsync", "No space left on device; free space there"), (shard_files, "_little_endian", "RuntimeError: the device is gone")],
)
def test_an_error_on_one_rank_is_the_same_error_on_all(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, step: int, owner: Any, name: str, text: str
) -> None:
    synthetic.save(tmp_path, "flat2", 100)
    before = tree(tmp_path)

    def gone(*_: object) -> None:
        raise RuntimeError("the device\nis gone")

    owned, state = synthetic.LAYOUTS["tensor3"], synthetic.full_state(1)
    monkeypatch.setattr(owner, name, on_rank(rank, disk_full if owner is os else gone, getattr(owner, name)))
    results = synthetic.in_world(
        3,
        lambda member: store.save(
            tmp_path, step, synthetic.fragments(owned[member.rank], state), samples_consumed=0, run={}, recipe="", communicator=member
        ),
    )
    assert all(isinstance(result, CheckpointError) for result in results), results
    assert len({str(result) for result in results}) == 1
    assert f"rank {rank}: {text}" in str(results[0])
    assert "\n" not in str(results[0])
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000100"]
    assert synthetic.holds(store.find_latest(tmp_path))


@pytest.mark.parametrize("failing", ["step_00000100.tmp-", "step_00000100", "latest.tmp-"])
def test_a_failed_move_puts_back_what_was_there(synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """While step 100 is saved again, each of the three renames fails in turn."""
    synthetic.save(tmp_path, "flat2", 100)
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source.name.startswith(failing) and not source.name.startswith(failing + ".") and threading.current_thread().name == "rank0":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(CheckpointError, match="Permission denied; make the folder writable"):
            synthetic.save(tmp_path, "flat2", 100, seed=1)
    assert synthetic.holds(store.find_latest(tmp_path), 1 if failing == "latest.tmp-" else 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000100"]
    synthetic.save(tmp_path, "flat2", 200)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000100", "step_00000200"]


def test_a_step_saved_again_is_replaced_also_where_the_old_one_is_damaged(synthetic: Any, tmp_path: Path) -> None:
    path = synthetic.save(tmp_path, "flat4 backwards", 100, seed=0)
    (path / "index.json").write_text("{")
    (path / "stray").write_text("x")
    assert synthetic.save(tmp_path, "flat2", 100, seed=1) == path
    assert synthetic.holds(path, 1)
    assert sorted(p.name for p in path.iterdir()) == [
        "index.json", "recipe.yaml", "state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors",
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000100"]


def test_a_file_system_that_is_not_shared_is_named(synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = store.write_shard

    def elsewhere(path: Path, fragments: Any) -> Any:
        other = tmp_path / "other node"
        other.mkdir(exist_ok=True)
        return write(other / path.name, fragments)

    def absent(path: Path, fragments: Any) -> Any:
        return write(tmp_path / "not here" / path.name, fragments)

    folder = tmp_path / "checkpoints"
    for behaviour, text in ((elsewhere, "rank 0 does not find"), (absent, "rank 1: the folder that rank 0 made is not there")):
        monkeypatch.setattr(store, "write_shard", on_rank(1, behaviour, write))
        with pytest.raises(CheckpointError, match=f"{text}.*a file system that all nodes share"):
            synthetic.save(folder, "flat2")
        assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(synthetic: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="could not be saved"):
        synthetic.save(tmp_path / "checkpoints", "one")
    assert (tmp_path / "checkpoints").read_text() == "a file"


def test_only_what_saves_left_is_swept(synthetic: Any, tmp_path: Path) -> None:
    mine = ["notes.txt", "step_00000050.tmp", "step_00000050.backup", "step_1.tmp-00000000", "best.tmp-00000000"]
    for name in mine:
        (tmp_path / name).mkdir()
    synthetic.save(tmp_path, "one", 100)
    for name in ("step_00000200.tmp-0123abcd", "step_00000100.old-0123abcd", "step_00000050.trash-0123abcd"):
        shutil.copytree(tmp_path / "step_00000100", tmp_path / name)
    shutil.copytree(tmp_path / "step_00000100", tmp_path / "step_00000099.old-0123abcd")
    (tmp_path / "latest.tmp-0123abcd").write_text("step_0")
    synthetic.save(tmp_path, "one", 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*mine, "latest", "step_00000099", "step_00000100", "step_00000300"]  # 99 was on its way to be replaced: put back
    )


def test_find_latest(synthetic: Any, tmp_path: Path) -> None:
    assert store.find_latest(tmp_path / "nothing") is None
    assert store.find_latest(tmp_path) is None
    (tmp_path / "step_00000400.tmp-0123abcd").mkdir()
    assert store.find_latest(tmp_path) is None
    for step in (100, 200, 300):
        synthetic.save(tmp_path, "one", step)
    assert store.find_latest(tmp_path) == tmp_path / "step_00000300"
    (tmp_path / "latest").write_text("step_00000200")  # a person sets the run back
    assert store.find_latest(tmp_path) == tmp_path / "step_00000200"
    (tmp_path / "step_00000200" / "recipe.yaml").unlink()
    with pytest.raises(
        CheckpointError, match=r"step_00000200: recipe.yaml is missing; the newest older whole one is step_00000100: write"
    ) as e:
        store.find_latest(tmp_path)
    assert "\n" not in str(e.value)
    (tmp_path / "latest").write_text("step_00000250\n")
    with pytest.raises(CheckpointError, match=r"step_00000250: there is no such folder; the newest older whole one is step_00000100"):
        store.find_latest(tmp_path)
    for text in ("../other/step_00000300", "/etc", "", "step_00000300.tmp-0123abcd", "step_00000300\nstep_00000100"):
        (tmp_path / "latest").write_text(text)
        with pytest.raises(CheckpointError, match="is no checkpoint's name; the newest whole checkpoint is step_00000300"):
            store.find_latest(tmp_path)
    (tmp_path / "latest").unlink()
    assert store.find_latest(tmp_path) == tmp_path / "step_00000300"
    (tmp_path / "step_00000300" / "index.json").unlink()
    assert store.find_latest(tmp_path) == tmp_path / "step_00000100"
    (tmp_path / "step_00000100" / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_00000300: index.json is missing; no older whole"):
        store.find_latest(tmp_path)


def test_locate_finds_what_a_person_means(synthetic: Any, tmp_path: Path) -> None:
    path = synthetic.save(tmp_path / "run" / "checkpoints", "one", 100)
    assert store.locate(path) == store.locate(tmp_path / "run") == store.locate(tmp_path / "run" / "checkpoints") == path
    path.rename(tmp_path / "best")
    assert store.locate(tmp_path / "best") == tmp_path / "best"
    assert synthetic.holds(tmp_path / "best")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run directory"):
        store.locate(tmp_path)
    (tmp_path / "best").rename(tmp_path / "step_00000200")
    with pytest.raises(CheckpointError, match="its index is that of step 100"):
        store.Checkpoint(tmp_path / "step_00000200")


def test_retention(synthetic: Any, tmp_path: Path) -> None:
    def steps() -> list[int]:
        return sorted(int(path.name[5:]) for path in tmp_path.iterdir() if path.name.startswith("step_"))

    assert store.retain(tmp_path / "nothing", 1) == []
    for step in (100, 200, 300, 400, 500):
        synthetic.save(tmp_path, "one", step)
    assert store.retain(tmp_path, 0) == []
    assert store.retain(tmp_path, 9) == []
    # A damaged one is none of those to keep, or the run could be left without a whole one.
    (tmp_path / "step_00000400" / "index.json").write_text("{}")
    assert [path.name for path in store.retain(tmp_path, 2)] == ["step_00000200", "step_00000100"]
    assert steps() == [300, 400, 500]
    # The run was set back: what it is about to replace is left alone, what `latest` names always stays.
    synthetic.save(tmp_path, "one", 100)
    assert store.retain(tmp_path, 1) == []
    (tmp_path / "latest").write_text("step_00000300")
    assert [path.name for path in store.retain(tmp_path, 1)] == ["step_00000100"]
    assert steps() == [300, 400, 500]
    (tmp_path / "latest").unlink()
    assert store.retain(tmp_path, 1) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000300", "step_00000400", "step_00000500"]
