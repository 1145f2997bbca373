"""Jobs keep their order whoever does them; what a worker raises, and a worker that is killed, end the work with a line."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing

import pytest

from bd3_scale.data.preparation.workers import in_order
from bd3_scale.errors import DataError


def test_order_failures_and_how_far_ahead() -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    for workers in (1, 2):
        taken.clear()
        with closing(in_order(abs, jobs(), workers)) as results:
            assert [next(results) for _ in range(20)] == list(range(20))
        assert len(taken) <= 20 + 2 * workers + 1  # the source may be longer than memory
        with pytest.raises(ValueError, match="invalid literal"):
            list(in_order(int, ["1", "2", "x", "4"], workers))
    with pytest.raises(DataError, match="a worker process was ended from outside"):
        list(in_order(_killed, range(8), 2))


def _killed(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number
