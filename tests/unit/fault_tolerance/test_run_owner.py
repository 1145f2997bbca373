"""A run directory has one owner: a living one is not disturbed, a dead one is succeeded by exactly one job."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bd3_scale.distributed.layout import Layout
from bd3_scale.errors import RecipeError, TrainingError
from bd3_scale.fault_tolerance import run_owner
from bd3_scale.fault_tolerance.run_owner import Owner, _take, own


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every owner is as one on another host."""
    monkeypatch.setattr(run_owner, "kernel", lambda: "")
    monkeypatch.setattr(run_owner, "PAUSE", 0.02)
    monkeypatch.setattr(run_owner, "BEAT", 0.05)
    monkeypatch.setattr(run_owner, "LEASE", 30.0)  # a living one beats long before
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.fixture(params=["links", "no links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # as exFAT does

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


def older(folder: Path, token: str, seconds: float) -> None:
    before = time.time() - seconds
    os.utime(folder / run_owner.FOLDER / token, (before, before))


@pytest.mark.usefixtures("file_system")
def test_a_living_owner_is_left_alone_and_one_that_ended_is_succeeded_at_once(
    tmp_path: Path, world_of_one: Layout, capfd: pytest.CaptureFixture[str]
) -> None:
    first = own(tmp_path, world_of_one)
    with pytest.raises(RecipeError, match=r"belongs to another job \(host .*, pid \d+\), which lives"):
        own(tmp_path, world_of_one)
    first.check()
    first.release()
    capfd.readouterr()
    second = own(tmp_path, world_of_one)
    assert not capfd.readouterr().err, "nothing was waited for"
    second.check()
    with pytest.raises(TrainingError, match=r"owns .* now"):
        first.check()
    second.release()
    assert [path.name for path in (tmp_path / run_owner.FOLDER).iterdir()] == [run_owner.CURRENT]


def test_silence_is_what_the_file_system_says(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_owner, "LEASE", 0.6)
    first = _take(tmp_path, [])  # it never beats
    second = _take(tmp_path, [])
    said = capfd.readouterr().err
    assert "waiting for a sign of life" in said and "not heard of for" in said
    assert Owner(tmp_path, first, beats=False).lost and not Owner(tmp_path, second, beats=False).lost
    older(tmp_path, second, 7200)
    _take(tmp_path, [])
    said = capfd.readouterr().err
    assert "not heard of for 72" in said and "waiting" not in said, "the time that is needed has passed already"


def test_the_ranks_hear_of_the_leader_while_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or `parallel.timeout` would end the collective in which they are."""
    monkeypatch.setattr(run_owner, "LEASE", 0.6)
    monkeypatch.setattr(run_owner, "ROUND", 0.05)
    _take(tmp_path, [])  # it never beats
    heard: list[Any] = []

    def broadcast(value: Any) -> Any:
        heard.append(value)
        return value

    layout = SimpleNamespace(is_main_rank=True, all_gather=lambda value: [value], broadcast=broadcast)
    made = own(tmp_path, layout)  # type: ignore[arg-type]
    assert made.lost is None and len(heard) > 2 and heard[:-1] == [None] * (len(heard) - 1)
    made.release()


def test_a_restart_by_the_same_launcher_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_of_one: Layout) -> None:
    monkeypatch.setattr(run_owner, "kernel", lambda: "one boot")
    monkeypatch.setattr(run_owner, "process_is_gone", lambda pid: False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    first = own(tmp_path, world_of_one)
    path = tmp_path / run_owner.FOLDER / run_owner.CURRENT
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": os.getpid() + 1}))  # another rank of this host
    own(tmp_path, world_of_one).check()
    assert first.lost
    other = json.loads(path.read_text())
    path.write_text(json.dumps({**other, "pid": os.getpid() + 1, "launchers": ["another torchrun"]}))
    with pytest.raises(RecipeError, match="which lives"):
        own(tmp_path, world_of_one)


def test_a_link_that_was_made_although_the_answer_is_that_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS repeats a request whose answer was lost, and answers the repetition."""
    link = os.link

    def repeated(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(os, "link", repeated)
    token = _take(tmp_path, [])
    assert (tmp_path / run_owner.FOLDER / token).exists(), "its sign of life"
    assert not Owner(tmp_path, token, beats=False).lost


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("dead", [False, True])
def test_of_many_that_come_at_once_one_wins(tmp_path: Path, dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_owner, "LEASE", 20.0)
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        if dead:
            older(folder, _take(folder, []), 7200)
        gate, results = threading.Barrier(6), []

        def come(folder: Path = folder, gate: threading.Barrier = gate, results: list[Any] = results) -> None:
            gate.wait()
            try:
                results.append(Owner(folder, _take(folder, []), beats=True))
            except RecipeError as error:
                results.append(error)

        threads = [threading.Thread(target=come) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        owners = [one for one in results if isinstance(one, Owner)]
        assert len(results) == 6 and len(owners) == 1 and not owners[0].lost
        owners[0].release()
