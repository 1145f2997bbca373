"""Inside, cycles go when they are told to; afterwards the collector is as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from bd3_scale.training.trainer import collect, collected_on_demand


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def frozen() -> Iterator[None]:
    """A caller has frozen what is there, as a process does that forks ranks."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
def test_cycles_go_on_demand() -> None:
    before = Cycle()
    old = weakref.ref(before)
    with collected_on_demand():
        there = weakref.ref(Cycle())
        for _ in range(20_000):
            Cycle()  # would set the collector off many times
        assert there() is not None
        del before
        collect()
        assert there() is None and old() is not None, "what was there at the beginning is not looked at"
    assert gc.isenabled() and gc.get_freeze_count() > 0, "what others froze stays so"
    gc.collect()
    assert old() is None


def test_the_collector_is_given_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), collected_on_demand():
        1 / 0  # noqa: B018
    assert gc.isenabled()
