"""A main thread that does nothing for too long is reported once, with stacks; one that works, or has not begun, is not."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from bd3_scale.fault_tolerance.hang_watchdog import Watchdog
from bd3_scale.fault_tolerance.heartbeat_file import EVERY, HEARTBEAT, HeartbeatFile

SECONDS = 0.3


def watched(heartbeat: HeartbeatFile, folder: Path) -> tuple[Watchdog, list[str], threading.Event]:
    told, event = [], threading.Event()

    def tell(line: str) -> None:
        told.append(line)
        event.set()

    return Watchdog(heartbeat, SECONDS, folder / "stacks", 3, tell), told, event


def test_silence_after_work_is_a_hang(tmp_path: Path) -> None:
    heartbeat = HeartbeatFile(None, 10)
    watchdog, told, event = watched(heartbeat, tmp_path)
    with watchdog:
        heartbeat.beat(4, "validate")
        assert event.wait(30)
    (line,) = told
    assert "rank 3" in line and "step 4, validate" in line and str(tmp_path / "stacks") in line


def test_work_and_a_start_that_takes_its_time_are_not(tmp_path: Path) -> None:
    heartbeat = HeartbeatFile(None, 10)
    watchdog, told, _ = watched(heartbeat, tmp_path)
    with watchdog:
        time.sleep(3 * SECONDS)  # before the first beat
        end = time.monotonic() + 3 * SECONDS
        while time.monotonic() < end:
            heartbeat.beat(1, "train")
            time.sleep(SECONDS / 100)
    assert not told and not watchdog._thread.is_alive()


def test_the_limit_follows_what_the_run_has_known(tmp_path: Path) -> None:
    """Twenty times its slowest piece of work, two minutes at least; all that is allowed where the kind of work is new."""
    now = [0.0]
    heartbeat = HeartbeatFile(None, 100, clock=lambda: now[0])
    watchdog = Watchdog(heartbeat, 1600.0, tmp_path, 0, print, times=20)

    def work(doing: str, seconds: float, times: int = 1) -> float:
        for _ in range(times):
            heartbeat.beat(1, doing)
            now[0] += seconds
        return watchdog.limit()

    assert work("train", 0.5, 5) == 1600, "not yet"
    assert work("train", 0.5, 10) == 120, "short steps: two minutes"
    assert work("train", 10.0, 2) == 200, "one of 10 s is behind us"
    assert work("validate", 1.0) == 1600, "the first validation may compile"
    assert work("train", 0.5) == 200 and work("validate", 1.0) == 200
    assert work("save", 3.0, 5) == 1600, "a save waits for the disk, whose moods nobody knows"
    heartbeat.waits = True
    assert watchdog.limit() == 1600, "rows may come late from elsewhere"
    heartbeat.waits = False
    assert work("train", 100.0, 3) == 1600, "never above the time-out"
    heartbeat.forget()
    assert work("train", 0.1) == 1600, "another block size"


def test_stacks_name_the_function_that_waits(tmp_path: Path) -> None:
    def waiting_for_godot(arrived: threading.Event) -> None:
        arrived.wait()

    arrived = threading.Event()
    thread = threading.Thread(target=waiting_for_godot, args=(arrived,))
    thread.start()
    watched(HeartbeatFile(None, 10), tmp_path)[0].dump()
    arrived.set()
    thread.join()
    text = (tmp_path / "stacks" / "rank-00003.txt").read_text()
    assert text.startswith("rank 3: 0 pieces of work done") and "waiting_for_godot" in text


def test_heartbeat_file_tells_an_outside_watcher(tmp_path: Path) -> None:
    now = [0.0]
    heartbeat = HeartbeatFile(tmp_path, 100, world_size=4, clock=lambda: now[0])

    def written() -> tuple[int, str]:
        content = json.loads((tmp_path / HEARTBEAT).read_text())
        assert content["world_size"] == 4 and abs(content["time"] - time.time()) < 60
        return content["step"], content["doing"]

    heartbeat.beat(1, "train")
    assert written() == (1, "train")
    heartbeat.beat(2, "train")
    assert written() == (1, "train"), "a file per step would be too many"
    now[0] += EVERY
    heartbeat.beat(3, "train")
    assert written() == (3, "train")
    heartbeat.beat(3, "save")
    assert written() == (3, "save"), "at once when the work changes"
    assert [path.name for path in tmp_path.iterdir()] == [HEARTBEAT]


def test_full_disk_costs_the_heartbeat_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    heartbeat = HeartbeatFile(tmp_path, 10)
    monkeypatch.setattr(Path, "write_text", full)
    heartbeat.beat(1, "train")
    assert heartbeat.count == 1
