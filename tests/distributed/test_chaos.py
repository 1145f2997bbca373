"""tools/chaos.py: a run that is killed and stopped at random moments is the undisturbed one, and its judgement can be negative."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import ALL

ROOT = Path(__file__).parents[2]
RUN = [
    *("training.steps=12", "objective.block_size=4", "model.layers=2", "checkpoint.every=3", "validation.every=4", "validation.rows=24"),
    *("tuner.enabled=true", "tuner.every=4", "tuner.start_step=4", "tuner.margin=0"),
]


@pytest.fixture(scope="module")
def chaos(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """(signal, rounds, *options) -> the report; all share one reference where the options let them."""
    folder = tmp_path_factory.mktemp("chaos")

    def go(name: str, rounds: int, *options: str) -> dict[str, Any]:
        command = [sys.executable, "tools/chaos.py", str(recipe), "--signal", name, "--rounds", str(rounds), "--ranks", "1", "2"]
        command += ["--work", str(folder / "work"), "--out", str(folder / "out"), *options, *RUN]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        (report,) = (folder / "out").glob(f"*-chaos-{name.lower()}.json")
        result = json.loads(report.read_text())
        assert (ended.returncode == 0) is (result["verdict"] == "passed")
        assert result["verdict"] == "passed", "\n".join(result["problems"]) + ended.stderr[-3000:]
        return result

    return go


@pytest.mark.parametrize(
    ("name", "rounds", "options"), [("KILL", 2, []), ("TERM", 2, ["--second", "--amend", "--seed", "5"])][: 2 if ALL else 1]
)
def test_disturbed_run_is_the_undisturbed_one(chaos: Callable[..., dict[str, Any]], name: str, rounds: int, options: list[str]) -> None:
    result = chaos(name, rounds, *options)
    sent = [one for one in result["rounds"] if one["moment"] != "end"]
    assert len(sent) == rounds == sum(result["moments"].values())  # which moments they are is a matter of time
    assert {one["moment"] for one in sent} == result["moments"].keys() <= {"start-up", "step", "save", "validation", "tuning"}
    assert result["rounds"][-1]["moment"] == "end" and result["runs_compared"] >= 1
    assert result["slots_compared"] >= 12 * 8
    assert {"train loss", "train gradient_norm", "validation nelbo", "tuner variances"} <= result["worst_relative_difference"].keys()
    assert max(result["worst_relative_difference"].values()) < 1e-5


@pytest.fixture(scope="module")
def trace_module() -> Iterator[Any]:
    specification = importlib.util.spec_from_file_location("chaos_trace", ROOT / "tools" / "chaos_trace.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["chaos_trace"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    yield module
    del sys.modules["chaos_trace"]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_doctored_metrics_are_found(trace_module: Any, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    for step in (1, 2):
        lines.append(
            {"kind": "train", "step": step, "loss": 3.0 / step, "gradient_norm": 0.5, "learning_rate": 1e-3, "interval": [0.1, 1.0]}
        )
        lines.append({"kind": "validation", "step": step, "nelbo": 2.0, "standard_error": 0.1, "tokens_per_second": step})
    reference = write(tmp_path / "reference", lines)

    def found(changed: list[dict[str, Any]]) -> list[str]:
        return trace_module.compare_metrics(reference, write(tmp_path / "run", changed))[1]

    assert found(lines) == [] and found([lines[0], {**lines[1], "tokens_per_second": 7}, *lines[2:]]) == []
    assert found([{**lines[0], "loss": 3.0 * (1 + 9e-6)}, *lines[1:]]) == []
    for doctored, said in (
        ([{**lines[0], "loss": 3.0 * (1 + 2e-5)}, *lines[1:]], "train loss of step 1"),
        ([*lines[:3], {**lines[3], "nelbo": "nan"}], "validation nelbo of step 2"),
        ([*lines[:3], {key: value for key, value in lines[3].items() if key != "nelbo"}], "validation nelbo of step 2"),
        ([*lines[:3], {**lines[3], "cross_entropy": 2.0}], "validation cross_entropy of step 2"),
        ([{**lines[0], "interval": [0.1]}, *lines[1:]], "train interval of step 1"),
        (lines[:3], "no validation line of step 2"),
        ([*lines, lines[0]], "two train lines of step 1"),
        ([*lines, {**lines[0], "step": 3}], "a train line of step 3"),
    ):
        problems = found(doctored)
        assert len(problems) == 1 and said in problems[0], problems


def test_doctored_samples_are_found(trace_module: Any, tmp_path: Path) -> None:
    """What a rank writes down of 4 steps of 4 rows in micro-batches of 2, changed in one place."""
    records: list[list[Any]] = []
    for step in range(4):
        for slots in ([0, 1], [2, 3]):
            records.append(["rows", step * 4, slots, [f"row {step} {slot}" for slot in slots]])
            records.append(["noise", step, slots, [f"noise {step} {slot}" for slot in slots]])

    def steps(first: int, stop: int) -> list[Any]:
        return [record for record in records if first <= (record[1] / 4 if record[0] == "rows" else record[1]) < stop]

    def read(changed: list[Any]) -> Any:
        return trace_module.Trace.read([write(tmp_path / "rank", changed)], 4)

    def found(*attempts: list[Any]) -> list[str]:
        return trace_module.compare_samples(read(records), [(read(changed), 1) for changed in attempts], 4, 4)

    def doctored(index: int, position: int, value: Any) -> list[Any]:
        record = json.loads(json.dumps(records[index]))
        record[position][0] = value
        return [*records[:index], record, *records[index + 1 :]]

    assert found(records) == [] and found(steps(0, 2), steps(2, 4)) == [] and found(steps(0, 3), [], steps(1, 4)) == []
    assert "attempt 0: other noise in step 1, slot 0" in found(doctored(5, 3, "noise 0 0"))
    assert "attempt 0: other rows in step 1, slot 0" in found(doctored(4, 3, "row 0 0"))
    assert any("slot 3 of step 1 was trained 2 times" in problem for problem in found(doctored(5, 2, 3)))
    assert any("slot 0 of step 2 was trained 0 times" in problem for problem in found(steps(0, 2), steps(3, 4)))
    assert any("slot 0 of step 3 was trained 0 times" in problem for problem in found(steps(0, 3)))
    assert found(steps(1, 4)) == ["no attempt began with step 0"]
