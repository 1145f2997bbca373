"""Python's garbage collector runs where the loop says so, on all ranks after the same steps.

By itself it runs at moments of its own on every rank; a pause of a tenth of a second on one of 64 ranks makes the other 63 wait in their
next collective, and nearly every step meets such a rank. Invariant: it runs as before when the loop is left, however that happens.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_on_demand() -> Iterator[None]:
    """Inside, nothing is collected but by `collect`; what exists at the beginning (imports, the model) is never looked at."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect() -> None:
    """The young objects: a few milliseconds."""
    gc.collect(1)
