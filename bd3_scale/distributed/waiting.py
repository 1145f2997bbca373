"""Says for whom a process waits: on stderr, within ten seconds, then more and more rarely (at 8, 16, 32, ... seconds).

A job that waits in silence looks like one that hangs, and whoever started it does not know which node to look at. Two forms: `Waiting`
for a loop that looks again and again, `waiting_for` around a call that blocks. Invariants: only the standard library is imported;
what is quick says nothing; a line holds who waits, for whom and where, and is written even while the main thread is in C code.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST = 8.0
"""Seconds until the first line; each further line comes after twice the time of the one before."""


class Waiting:
    """One wait."""

    def __init__(self, speaks: bool = True, began: float | None = None) -> None:
        """`speaks`: False where another process of this host says the same. `began`: on the monotonic clock, if not now."""
        self._began = time.monotonic() if began is None else began
        self._next = FIRST if speaks else float("inf")

    def look(self, whom: Callable[[], str]) -> None:
        """Speak if it is time; to be called often. `whom` gives the line without its beginning."""
        seconds = time.monotonic() - self._began
        if seconds >= self._next:
            self._next = max(2 * self._next, seconds)
            say(f"waiting for {seconds:.0f} s: {whom()}")

    @property
    def due(self) -> float:
        """Seconds until the next line."""
        return self._next - (time.monotonic() - self._began)


@contextmanager
def waiting_for(whom: Callable[[], str], speaks: bool = True) -> Iterator[None]:
    """Speak from a thread for as long as the block takes."""
    waiting, over = Waiting(speaks), threading.Event()

    def watch() -> None:
        while not over.wait(max(0.05, min(waiting.due, 3600.0))):
            waiting.look(whom)

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def say(text: str) -> None:
    """One line, at once and whole: the lines of several processes go to one file."""
    os.write(2, f"bd3_scale: {text}\n".encode())
