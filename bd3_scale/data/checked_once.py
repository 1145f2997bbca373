"""What the first process of a node finds when it checks a shard, for the others: the shard is read and hashed once per node.

Found are where the rows stand and the checksum of each, and every row that anybody reads is compared with that (checked_rows.py): who
takes it over is as safe as who found it. It lies in memory, in a folder that only this user may write; each process takes its own
findings away when it ends, and what killed ones left goes when it is old and somebody comes. Invariants: a finding belongs to one file as
it was (device, inode, size, time of change, hash): another or a changed file is checked anew; a finding is whole or not there; where it
cannot be kept, or another job took it away, every process checks for itself, and nothing else happens.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bd3_scale.data.lock import exclusive
from bd3_scale.data.manifest import FileEntry
from bd3_scale.errors import DataError
from bd3_scale.launcher import launched

_mine: set[Path] = set()
"""What this process has left for others."""
KEPT = 3600.0
"""Seconds that a finding stays: the processes of a node open a shard within minutes of each other."""


class Checked(NamedTuple):
    """Of a file that has passed its check."""

    offsets: np.ndarray
    """int64 [rows]: the byte at which each row begins."""
    checksums: np.ndarray
    """uint32 [rows]: CRC-32."""


@contextlib.contextmanager
def finding(path: Path, entry: FileEntry) -> Iterator[Checked | None]:
    """Hold what is known of the file at `path`, if anything is, and keep the other processes of this node from checking it meanwhile."""
    place = _place(path, entry)
    if place is None:
        yield None
        return
    with contextlib.ExitStack() as held:
        with contextlib.suppress(DataError):  # no lock to be had: each for itself
            held.enter_context(exclusive(place.with_suffix(".lock")))
        yield _read(place)


def keep(path: Path, entry: FileEntry, checked: Checked) -> None:
    """Leave for the others what was found in the file at `path`."""
    if (place := _place(path, entry)) is not None:
        with contextlib.suppress(OSError):
            _write(place, checked)
            _mine.add(place)


def take_away() -> None:
    """At the end: what this process has left for others goes, and the folder with the last of it."""
    folders = {place.parent for place in _mine}
    while _mine:
        with contextlib.suppress(OSError):
            _mine.pop().unlink()
    for folder in folders:
        with contextlib.suppress(OSError):  # others have theirs there
            folder.rmdir()


def sweep() -> None:
    """Delete what is old, of whichever job."""
    if (folder := _folder()) is None:
        return
    for old in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > KEPT:
                os.unlink(old.path)


def _place(path: Path, entry: FileEntry) -> Path | None:
    """Where the finding of a file lies; None where there is no file, or no folder."""
    folder = _folder()
    try:
        status = os.stat(path)
    except OSError:
        return None
    name = f"{entry.xxh64}-{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}.npz"
    return None if folder is None or status.st_size != entry.bytes else folder / name


def _folder() -> Path | None:
    """None where this process is alone on its node, or no folder is safe."""
    if launched().local_world_size < 2:
        return None
    memory = Path("/dev/shm")
    folder = (memory if memory.is_dir() else Path(tempfile.gettempdir())) / f"bd3_scale-{os.getuid()}-checked"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    return folder if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022 else None


def _read(path: Path) -> Checked | None:
    try:
        with np.load(path, allow_pickle=False) as content:
            return Checked(content["offsets"], content["checksums"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, checked: Checked) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with open(new, "wb") as file:
        np.savez(file, offsets=checked.offsets, checksums=checked.checksums)
    new.replace(path)
