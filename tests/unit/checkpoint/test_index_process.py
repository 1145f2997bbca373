"""An index is the same whoever makes it, and the process that makes a large one starts without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from bd3_scale.checkpoint import index_process
from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.index import FileRecord, build, render
from bd3_scale.checkpoint.parts import pack, state_name
from bd3_scale.checkpoint.region import Region
from bd3_scale.errors import CheckpointError

RANKS = 3


def content(last: int = 9) -> tuple[Any, ...]:
    """A tensor of 9 elements, divided over three ranks; `last`: where the last part ends."""
    bounds = [(0, 3), (3, 6), (6, last)]
    packed = {
        rank: pack([Fragment("weight", "w", Region.flat((9,), *bound), torch.zeros(bound[1] - bound[0]))])
        for rank, bound in enumerate(bounds)
    }
    files = {state_name(rank, RANKS): FileRecord(1 << 10, "0" * 64) for rank in range(RANKS)} | {"recipe.yaml": FileRecord(1, "0" * 64)}
    return 7, 70, {"text": "Grüße"}, {"torch": "2"}, files, packed


@pytest.fixture
def never_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("made in this process")

    monkeypatch.setattr(index_process, "SMALL", 0)
    monkeypatch.setattr(index_process, "build", refuse)


@pytest.mark.usefixtures("never_here")
def test_the_bytes_of_another_process_are_those_of_this_one() -> None:
    assert index_process.make(*content()) == render(build(*content()))


@pytest.mark.usefixtures("never_here")
def test_the_error_of_another_process_is_that_of_this_one() -> None:
    with pytest.raises(CheckpointError) as expected:
        build(*content(last=8))
    with pytest.raises(CheckpointError) as found:
        index_process.make(*content(last=8))
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("executable", ["/nowhere/python", "/bin/false"])
def test_without_a_process_the_index_is_made_here(monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    monkeypatch.setattr(index_process, "SMALL", 0)
    monkeypatch.setattr(sys, "executable", executable)
    assert index_process.make(*content()) == render(build(*content()))


def test_the_process_needs_no_torch() -> None:
    asked = f"import sys, {index_process.__name__}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout == "False\n"
