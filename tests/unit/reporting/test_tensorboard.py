"""TensorBoard events hold the numbers of metrics.jsonl, and their failure stops no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_scale.reporting.tensorboard import TensorBoard
from bd3_scale.rules import run as rules
from tests.unit.refusing import refused

LINE = {"kind": "train", "step": 5, "loss": 2.5, "interval": [0.3, 0.8], "text": "no number"}


def test_numbers_of_a_line_are_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    board = TensorBoard(True, tmp_path, first_step=0)
    board.log(LINE)
    board.close()
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: [(event.step, round(event.value, 6)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {"train/loss": [(5, 2.5)], "train/interval_beta": [(5, 0.3)], "train/interval_omega": [(5, 0.8)]}


def test_off_is_nothing(tmp_path: Path) -> None:
    board = TensorBoard(False, tmp_path, first_step=0)
    board.log(LINE)
    board.close()
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_said_before_the_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'bd3_scale[tensorboard]'" in refused(base, ["tracking.tensorboard=true"])
