"""Before there is something to save, SIGTERM and SIGUSR1 end the process with status 0.

Invariants: only the standard library is imported here, so that the handlers stand before torch is imported (seconds, in which a
cluster may change its mind); a signal is heard even while the main thread waits in a collective or packs data, which both survive a
kill at any moment. While `listening` is set, signals belong to a `stop_request.StopRequest`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

listening = threading.Event()
"""Set while a `StopRequest` turns signals into a stop of its loop."""
heard: list[int] = []
"""Signals that came before anybody listened and did not end the process yet: whoever begins to listen takes them over."""


@contextmanager
def exit_on_early_signal(leader: bool, last: bool = False) -> Iterator[None]:
    """While nobody listens, SIGTERM and SIGUSR1 end this process with status 0. In the main thread.

    `last`: nothing comes after it but the end of the process (with torch a second or more), which signals do not change any more.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # heard even while the main thread is in C code
    before = {number: signal.signal(number, _noted) for number in (signal.SIGTERM, signal.SIGUSR1)}
    threading.Thread(target=_leave_on_signal, args=(reader, leader), name="signals", daemon=True).start()
    heard.clear()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)
        os.close(writer)  # the thread reads the end of the pipe and ends


def _noted(number: int, frame: FrameType | None) -> None:
    """The thread has it, unless somebody listens before it is awake; a default handler would end the process with another status."""
    heard.append(number)


def _leave_on_signal(reader: int, leader: bool) -> None:
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while byte := pipe.read(1):
            if byte[0] in (signal.SIGTERM, signal.SIGUSR1) and not listening.is_set():
                leave(signal.Signals(byte[0]).name, leader)


def leave(name: str, leader: bool) -> None:
    """End this process, now and with status 0."""
    if leader:
        os.write(2, f"\nbd3_scale: {name}: leaving; nothing is lost, the same command goes on\n".encode())
    os._exit(0)
