"""A command as a whole process: short to start and short to end.

torch and its like make half a million Python objects while they are imported. The garbage collector looks through all of them again and
again while they come, and once more when the process ends, to free what the system takes back anyway: together a third of the CPU time
of a command with little to do, and a thousand ranks start at once.

Invariants: only a process that is nothing but the command is changed (`main` of a command is a function like any other); garbage is
collected while the command works, and exits as Python's: `atexit`, threads that are no daemons and open files have their turn.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import NoReturn


def run_program(main: Callable[[], int]) -> NoReturn:
    """Do what `main` does, and end this process with the status that it returns."""
    gc.set_threshold(10_000)  # new objects until the young ones are looked at; Python begins with 700
    try:
        sys.exit(main())
    finally:
        gc.freeze()  # nothing is looked at any more
