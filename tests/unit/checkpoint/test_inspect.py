"""`bd3 inspect`: what it prints is what is there, and damage is one line and status 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bd3_scale import inspect


def test_people_and_programs_see_the_same(synthetic: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = synthetic.save(tmp_path / "checkpoints", "tensor2", 100)
    assert inspect.main([str(tmp_path), "--json", "--verify"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == str(path)
    assert (document["step"], document["samples_consumed"], document["verified"]) == (100, 800, True)
    assert document["kinds"] == dict.fromkeys(("weight", "exp_avg", "exp_avg_sq", "ema"), len(synthetic.SHAPES))
    assert {tensor["name"]: tuple(tensor["shape"]) for tensor in document["tensors"]} == synthetic.SHAPES
    assert document["parameters"] == sum(tensor["elements"] for tensor in document["tensors"])
    assert document["run"] == synthetic.RUN
    assert {name: (path / name).stat().st_size for name in document["files"]} == {n: f["bytes"] for n, f in document["files"].items()}
    assert inspect.main([str(path)]) == 0
    text = capsys.readouterr().out
    for word in (
        "step         100",
        "800 samples",
        f"{document['parameters']:,}",
        "12 x 5",
        "scalar",
        "torch ",
        "not verified",
        *synthetic.SHAPES,
    ):
        assert word in text


def test_damage_is_one_line_and_status_1(synthetic: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = synthetic.save(tmp_path, "tensor2", 100)
    file = path / "state-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert inspect.main([str(path), "--verify"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"{file.name} was damaged" in captured.err
    assert inspect.main([str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
