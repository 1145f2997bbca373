"""Who is called slow, and what is measured: the layers of a training step, and nothing of the validation that follows a logging line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bd3_scale.distributed.layout import Layout
from bd3_scale.fault_tolerance.pace import LONG, Pace


def pace(ranks: int, stages: int = 1, modules: list[nn.Module] | None = None) -> Pace:
    hosts = [(f"node-{rank}", rank % stages) for rank in range(ranks)]
    layout = SimpleNamespace(world_size=ranks, rank=0, device=torch.device("cpu"), pipeline_rank=0, all_gather=lambda value: hosts)
    return Pace(cast(Layout, layout), modules or [])


def test_a_rank_is_named_once_when_it_has_been_slow_for_long() -> None:
    judged = pace(4)
    lines = [judged.judge([0.5, 0.5, 0.9, 0.5]) for _ in range(LONG + 5)]
    assert [len(line) for line in lines] == [0] * (LONG - 1) + [1] + [0] * 5
    assert lines[LONG - 1][0].startswith("rank 2 on host node-2 is slow")


def test_a_pause_begins_the_count_anew_and_stages_are_their_own_measure() -> None:
    judged = pace(6, stages=2)
    for turn in range(3 * LONG):
        # Stage 0 takes twice what stage 1 takes: that is the layout, and no rank's fault. Rank 0 is slow but for every eighth time.
        assert not judged.judge([1.0 + 2.0 * (turn % 8 > 0), 0.5, 1.0, 0.5, 1.0, 0.5]), turn


def test_a_validation_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 2)
    measured, told = pace(2, modules=[layer]), list[Any]()
    monkeypatch.setattr(dist, "all_reduce", lambda seconds: None)
    for _ in range(3):
        measured.begin_step(0.25)
        layer(torch.ones(2))
        measured.end_step()
        told.append((len(measured._marks), measured.read(lambda line: None)))
        layer(torch.ones(2))  # a validation
    assert [marks for marks, _ in told] == [0, 1, 1], "nothing is due before the first reading"
    assert told[0][1] == {} and all(0.25 < seconds["most"] < 10 for _, seconds in told[1:])
