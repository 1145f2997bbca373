"""Warnings and notes for people, through `logging.getLogger("bd3_scale")`; what a command finds is printed, what ends it is a `UserError`.

A command calls `show` once: then stderr has a note as it is, a warning behind `bd3_scale: warning:` and, of several ranks, the one that
speaks. A program that imports bd3_scale has what Python does by itself, warnings on stderr and no notes, or handlers of its own; every
record has a `rank`. Invariants: a line is written whole, above a progress bar; nothing here is called by a signal handler or
beside a thread that hangs (those write with `os.write`, since logging takes locks).
"""

from __future__ import annotations

import logging
import sys

from bd3_scale.launcher import launched

log = logging.getLogger("bd3_scale")


def _with_rank(record: logging.LogRecord) -> bool:
    record.rank = launched().rank
    return True


log.addFilter(_with_rank)


class Lines(logging.Handler):
    """Writes to what is stderr at that moment; `note`: what a note begins with."""

    def __init__(self, note: str) -> None:
        super().__init__()
        self.note = note

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno <= logging.INFO:
            return self.note + super().format(record)
        rank = f"[rank {launched().rank}] " if launched().world_size > 1 else ""
        return f"bd3_scale: {record.levelname.lower()}: {rank}{super().format(record)}"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line, bars = self.format(record) + "\n", sys.modules.get("tqdm")
            if bars is not None and sys.stderr.isatty():
                bars.tqdm.write(line, file=sys.stderr, end="")
            else:
                sys.stderr.write(line)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def show(note: str = "") -> None:
    """What is said goes to stderr from now on, and to no handler of other libraries as well. `note`: what a note begins with."""
    log.handlers = [Lines(note)]
    log.setLevel(logging.INFO)
    log.propagate = False
