"""The index of a large checkpoint is made in a process of its own, since Python there takes no time from the thread that trains.

A thread of the leader that sorts the parts of a thousand ranks holds the interpreter for tenths of a second, in which the main thread
launches half of what it does alone. A process of its own costs its start instead (it needs no torch, which a test keeps so), and nobody
waits for that; a small index is made at once. Invariants: whoever makes it, the bytes and the CheckpointError are the same; where no
process can be had (no memory, no more processes, ended by a signal that was meant for the job) the index is made here.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bd3_scale.checkpoint.index import FileRecord, build, render
from bd3_scale.errors import CheckpointError

SMALL = 1 << 15
"""Bytes that all ranks have packed, up to which an index is made at once: some milliseconds."""
LONGEST = 600.0
"""Seconds after which the process is taken to hang."""
WRONG = 3
"""Status of a process whose output is the text of a CheckpointError."""


def make(
    step: int,
    samples_consumed: int,
    run: Mapping[str, Any],
    versions: Mapping[str, str],
    files: Mapping[str, FileRecord],
    packed: Mapping[int, tuple[bytes, bytes]],
) -> bytes:
    """The text of index.json, of what each writer has packed (see `index.build`). Raises CheckpointError where it is no whole state."""
    content = step, samples_consumed, run, versions, files, packed
    apart = sum(map(len, (part for parts in packed.values() for part in parts))) > SMALL
    text = _made_apart(content) if apart else None
    return render(build(*content)) if text is None else text


def _made_apart(content: Any) -> bytes | None:
    """None where the process did not get to its end."""
    package = str(Path(__file__).parents[2])  # behind everything else
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.append({package!r}); from {__name__} import answer; answer()"]
    try:
        with tempfile.TemporaryFile() as question:  # no pipe: it would be filled by Python, in small pieces
            pickle.dump(content, question)
            question.seek(0)
            ended = subprocess.run(command, stdin=question, capture_output=True, env=environment, timeout=LONGEST, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if ended.returncode == WRONG:
        raise CheckpointError(ended.stdout.decode())
    return ended.stdout if ended.returncode == 0 else None


def answer() -> None:
    """In the process: what `make` is asked on the standard input goes to the standard output."""
    content = pickle.load(sys.stdin.buffer)
    try:
        text = render(build(*content))
    except CheckpointError as error:
        sys.stdout.buffer.write(str(error).encode())
        sys.stdout.flush()
        sys.exit(WRONG)
    sys.stdout.buffer.write(text)
