"""Paths as people write them; files that are there after a crash; how many files and sockets a process may have open, and how many a world
of many ranks needs."""

from __future__ import annotations

import contextlib
import math
import os
import resource
from pathlib import Path

from bd3_scale.errors import RecipeError


def expanded(path: str | Path) -> Path:
    """With the home directory for ~. Raises RecipeError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise RecipeError(f"{path}: this user (uid {os.getuid()}) has no home directory; set HOME, or write the path in full") from None


MOST_FILES = 1 << 20
"""Open files that a process asks for where the system knows no limit."""


def raise_file_limit() -> int:
    """Let this process open as many files and sockets as the system lets it raise by itself (the hard limit); returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return most if soft == resource.RLIM_INFINITY else soft


def files_needed(ranks: int) -> int:
    """Descriptors that a process of a world of `ranks` may need: the store, which the launcher holds, has two connections of every rank
    (its own and its guard's); groups of gloo talk to about 2 log2(ranks) others each; shards of data and checkpoints are open beside."""
    return 512 + 2 * ranks + 32 * math.ceil(math.log2(max(ranks, 2)))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: a new or renamed file is only there after a crash if its directory was synced."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
