"""wandb: off unless asked for, one run however often restarted, nothing secret, and never a reason to lose a run."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from bd3_scale.recipe import Recipe
from bd3_scale.reporting.tracking import ID_FILE, Tracker

LINE = {"kind": "train", "step": 10, "loss": 2.5, "mfu": None, "interval": [0.3, 0.8], "seconds": 1.0}


class FakeRun:
    def __init__(self, wandb: FakeWandb) -> None:
        self.wandb, self.logged, self.steps, self.finished = wandb, [], [], 0

    def define_metric(self, name: str, step_metric: str | None = None, hidden: bool = False) -> None:
        self.steps.append((name, step_metric))

    def log(self, values: dict[str, Any], **options: Any) -> None:
        assert "step" not in options, "wandb's own counter refuses the steps that a continued run makes again"
        self.wandb.fail_in("log")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1
        self.wandb.fail_in("finish")


class FakeWandb:
    """Stands in for the module; `broken` names the call that fails."""

    def __init__(self, broken: str = "") -> None:
        self.broken, self.calls, self.runs = broken, [], []
        self.Settings = dict

    def init(self, **options: Any) -> FakeRun:
        self.calls.append(options)
        self.fail_in("init")
        self.runs.append(FakeRun(self))
        return self.runs[-1]

    def fail_in(self, call: str) -> None:
        if call == self.broken:
            raise ConnectionError(f"{call}\nis broken")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def recipe(mode: str = "offline") -> Recipe:
    recipe = Recipe()
    recipe.tracking.wandb = mode
    return recipe


def test_disabled_is_the_default_and_touches_nothing(wandb: FakeWandb, tmp_path: Path) -> None:
    tracker = Tracker(Recipe(), tmp_path, "known")
    tracker.log(LINE)
    tracker.close()
    assert wandb.calls == [] and tracker.run_id == "known" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_mode_is_always_passed_and_the_id_is_kept(mode: str, wandb: FakeWandb, tmp_path: Path) -> None:
    tracker = Tracker(recipe(mode), tmp_path)
    options = wandb.calls[0]
    assert (options["mode"], options["resume"], options["dir"]) == (mode, "allow", str(tmp_path))
    assert options["id"] == tracker.run_id == (tmp_path / ID_FILE).read_text().splitlines()[0]


def test_restart_continues_the_run(wandb: FakeWandb, tmp_path: Path) -> None:
    """With the run directory's id, or the checkpoint's where the directory was lost."""
    first = Tracker(recipe(), tmp_path).run_id
    Tracker(recipe(), tmp_path)
    Tracker(recipe(), tmp_path / "lost", "of-the-checkpoint")
    assert [call["id"] for call in wandb.calls] == [first, first, "of-the-checkpoint"]


def test_lines_are_sent_by_kind_with_the_step_as_a_value(wandb: FakeWandb, tmp_path: Path) -> None:
    tracker = Tracker(recipe(), tmp_path)
    tracker.log(LINE)
    tracker.log({"kind": "validation", "step": 10, "nelbo": 3.0})
    tracker.close()
    tracker.close()
    (run,) = wandb.runs
    assert run.logged == [
        {"step": 10, "train/loss": 2.5, "train/seconds": 1.0, "train/interval_beta": 0.3, "train/interval_omega": 0.8},
        {"step": 10, "validation/nelbo": 3.0},
    ]
    assert ("*", "step") in run.steps and run.finished == 1


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_failure_is_said_once_and_stops_nothing(broken: str, wandb: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wandb.broken = broken
    tracker = Tracker(recipe(), tmp_path)
    for _ in range(3):
        tracker.log(LINE)
    tracker.close()
    tracker.close()
    assert caplog.messages == [f"wandb failed (ConnectionError: {broken} is broken); training goes on without it"]


def test_missing_wandb_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    Tracker(recipe(), tmp_path).log(LINE)
    assert caplog.text.count("training goes on without it") == 1


def test_credentials_of_a_recipe_stay_here(wandb: FakeWandb, tmp_path: Path) -> None:
    asked = recipe()
    asked.data.remote = "https://user:secret1@host/corpus?sig=secret2"
    Tracker(asked, tmp_path)
    config = wandb.calls[0]["config"]
    assert config["data"]["remote"] == "https://***@host/corpus?***"
    assert config["model"] == vars(asked.model), "the rest is the resolved recipe"
    assert "secret" not in str(config)


def test_real_offline_run_is_continued_and_holds_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_SILENT", "true")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run_id = None
    for _ in range(2):
        tracker = Tracker(recipe(), tmp_path, run_id)
        run_id = tracker.run_id
        assert tracker.run is not None
        tracker.log(LINE)
        tracker.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers, "wandb took our signals"
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert runs and all(list(run.glob("*.wandb")) for run in runs)
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert len(files) > 1 and not [path for path in files if key.encode() in path.read_bytes()]


def test_a_copy_of_a_run_directory_is_another_run_and_a_moved_one_is_the_same(
    wandb: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, copy, moved = (tmp_path / name for name in ("original", "copy", "moved"))
    known = Tracker(recipe(), original).run_id
    shutil.copytree(original, copy)
    other = Tracker(recipe(), copy, known).run_id  # its checkpoints hold the id of the original
    (warning,) = caplog.messages
    assert other != known and str(original) in warning and str(copy / ID_FILE) in warning and "\n" not in warning
    assert Tracker(recipe(), copy, known).run_id == other and Tracker(recipe(), original, known).run_id == known
    original.rename(moved)
    assert Tracker(recipe(), moved, known).run_id == known and len(caplog.messages) == 1
    monkeypatch.setattr("socket.gethostname", lambda: "another-node")
    assert Tracker(recipe(), moved, known).run_id == known  # a shared file system
    elsewhere = tmp_path / "fetched"
    shutil.copytree(moved, elsewhere)
    monkeypatch.setattr("socket.gethostname", lambda: "a-third-node")
    assert Tracker(recipe(), elsewhere, known).run_id != known
    (elsewhere / ID_FILE).write_text(f"{known}\n")  # as the warning says, and as earlier versions wrote it
    assert Tracker(recipe(), elsewhere).run_id == known
