"""What is found of shards leaves memory with the job that found it, or with a later one; another job's stays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bd3_scale.data import checked_once
from bd3_scale.data.open import Data, open_data
from bd3_scale.recipe.schema import DataConfig

CONTEXT = 64


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "memory"

    def folder() -> Path:
        place.mkdir(exist_ok=True)
        return place

    monkeypatch.setattr(checked_once, "_folder", folder)
    return place


def opened(folder: Path) -> Data:
    config = DataConfig(path=str(folder), tokenizer="bytes")
    return open_data(config, CONTEXT, leader=True, barrier=lambda: None)


def test_findings_go_with_the_job_that_made_them(copy_of: Callable[..., Path], memory: Path) -> None:
    with opened(copy_of("mds")) as data:
        other = memory / "of-another-job.npz"
        other.touch()
        data.sources[0].train.rows([0])
        assert len(list(memory.iterdir())) == 2
    assert list(memory.iterdir()) == [other]
    other.unlink()
    with opened(copy_of("mds", "again")) as data:
        data.sources[0].train.rows([0])
        assert memory.exists()
    assert not memory.exists()


def test_what_a_dead_job_left_goes_when_the_next_one_starts(copy_of: Callable[..., Path], memory: Path) -> None:
    memory.mkdir()
    old, new = memory / "old.npz", memory / "new.npz"
    for file in (old, new):
        file.touch()
    os.utime(old, times=(before := time.time() - 2 * checked_once.KEPT, before))
    with opened(copy_of("mds")):
        assert list(memory.iterdir()) == [new]
