"""The meter measures the window between two readings; metrics.jsonl survives kills and holds every step once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bd3_scale.errors import TrainingError
from bd3_scale.reporting import metrics
from bd3_scale.reporting.metrics import Meter, MetricsFile, read_metrics

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def one(value: float) -> torch.Tensor:
    return torch.tensor(value)


def test_reading_is_the_mean_of_its_window_and_the_sum_over_replicas(clock: Clock) -> None:
    meter = Meter(CPU, data_tokens=1000, peak_flops=None)
    meter.add(one(1.0), one(3.0))
    meter.add(one(2.0), one(5.0), 0.5)
    clock.now += 4.0
    calls: list[torch.Tensor] = []

    def reduce(value: torch.Tensor) -> torch.Tensor:
        calls.append(value)
        return value.mul_(2)  # two replicas with equal parts

    first = meter.read(1800, reduce, 6.0)
    assert len(calls) == 1 and calls[0].numel() == 4, "one reduction per reading, of two numbers a step"
    assert first["loss"] == pytest.approx(3.0) and first["controlled_loss"] == pytest.approx(2.5)
    assert first["gradient_norm"] == pytest.approx(4.0), "the norm is global already"
    assert first["tokens_per_second"] == pytest.approx(200.0)
    assert first["mfu"] is None
    assert first["memory_bytes"] > 1 << 20

    meter.add(one(7.0), one(1.0))
    clock.now += 1.0
    second = meter.read(1900, lambda value: value, 6.0)
    assert (second["loss"], second["gradient_norm"], second["tokens_per_second"]) == pytest.approx((7.0, 1.0, 100.0))


def test_a_step_that_has_no_numbers_is_not_in_the_means() -> None:
    meter = Meter(CPU, data_tokens=0, peak_flops=None)
    for loss, norm in ((1.0, 4.0), (float("nan"), float("inf")), (3.0, 8.0)):
        meter.add(one(loss), one(norm))
    read = meter.read(10, lambda value: value, 6.0)
    assert (read["loss"], read["gradient_norm"]) == pytest.approx((2.0, 6.0))
    meter.add(one(float("inf")), one(float("inf")))
    assert not math.isfinite(meter.read(20, lambda value: value, 6.0)["loss"]), "nothing but such steps: that must be seen"


def test_mfu_is_model_flops_over_the_peak(clock: Clock) -> None:
    meter = Meter(CPU, data_tokens=0, peak_flops=4e12)
    meter.add(one(1.0), one(1.0))
    clock.now += 10.0
    assert meter.read(3000, lambda value: value, 6e9)["mfu"] == pytest.approx(300 * 6e9 / 4e12)


def test_time_spent_on_something_else_does_not_slow_training(clock: Clock) -> None:
    meter = Meter(CPU, 0, None)
    meter.add(one(1.0), one(1.0))
    clock.now += 2.0 + 50.0
    meter.skip(50.0)
    assert meter.read(100, lambda value: value, 6.0)["tokens_per_second"] == pytest.approx(50.0)


def test_nothing_is_read_from_the_device_between_readings() -> None:
    """Tensors of the meta device have no values: asking for one raises."""
    meter = Meter(CPU, 0, None)
    meter.add(torch.zeros((), device="meta"), torch.zeros((), device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.read(1, lambda value: value, 6.0)


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_continued_run_lives_its_lost_steps_again(tmp_path: Path, clock: Clock) -> None:
    """Killed after step 120 in the middle of a line, continued from 100: every step once, and time goes on."""
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(10, 121, 10):
        clock.now += 1.0
        file.write({"kind": "train", "step": step, "loss": 1.0})
    with open(path, "a") as cut:
        cut.write('{"kind": "train", "step": 130, "lo')

    clock.now += 1000.0
    file = MetricsFile(path, 100)
    assert steps(path) == list(range(10, 101, 10))
    clock.now += 1.0
    file.write({"kind": "train", "step": 110, "loss": 2.0})
    assert steps(path) == list(range(10, 111, 10))
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == steps(path), "whole lines only"
    assert [line["seconds"] for line in read_metrics(path)] == [float(n) for n in range(1, 12)], "the pause does not count"
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_run_that_starts_again_keeps_nothing_of_the_first_try(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).write({"step": 5})
    file = MetricsFile(path, 0)
    assert steps(path) == []
    assert file.write({"step": 1})["seconds"] < 5


def test_lines_are_strict_json_of_plain_numbers(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(
        {
            "step": np.int64(1),
            "loss": math.nan,
            "mfu": None,
            "rate": torch.tensor(1.5),
            "interval": (0.25, np.float32(0.5)),
            "variances": [{"interval": [0.1, 0.6], "variance": math.inf}],
        }
    )
    (text,) = file.path.read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads(text, parse_constant=refuse)
    assert {**line, "seconds": 0} == {
        "step": 1,
        "loss": "nan",
        "mfu": None,
        "rate": 1.5,
        "interval": [0.25, 0.5],
        "variances": [{"interval": [0.1, 0.6], "variance": "inf"}],
        "seconds": 0,
    }
    with pytest.raises(ValueError, match="cannot hold"):
        file.write({"step": 2, "what": object()})
    assert steps(file.path) == [1], "a refused line leaves no trace"


def test_damage_before_the_end_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\xff\x00\n{"step": 2}\n{"step": 3, "x')
    assert steps(path) == [1, 2]
    (warning,) = caplog.messages
    assert "line 2 is damaged" in warning


def test_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.path = Path("/dev/full")
    with pytest.raises(TrainingError, match=r"/dev/full cannot be written \(No space left on device\); free space"):
        file.write({"step": 1})
