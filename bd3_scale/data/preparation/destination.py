"""The folder that a preparation makes: claimed before the work, given its content at the end.

All work is done inside the folder itself, so that it may be what it likes (a mount point, a link, another file system than its parent) and
what forbids writing there is found before the first document is read. Invariants: two processes that prepare one folder do not disturb each
other: one works, the other waits and finds the work done; the folder is data by its manifest, which comes last; a folder that holds
anything else is not touched; what a killed process left is known by its name and goes with the next one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bd3_scale.data.lock import exclusive
from bd3_scale.data.manifest import MANIFEST, SPLITS
from bd3_scale.errors import DataError
from bd3_scale.files import sync_directory

SCRATCH = ".preparing"
CONTENT = "data"
"""In the scratch folder: what the folder will hold."""
_LOCK = ".preparing.lock"
_OF_FILE_SYSTEMS = {"lost+found"}


@contextmanager
def claimed(folder: Path) -> Iterator[Path | None]:
    """Hold the folder; the scratch folder in it, which may hold what a killed process did, or None where `folder` is data already.

    Raises DataError where it cannot be written, or holds other things.
    """
    try:
        there = folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.path={folder}: cannot be created ({error.strerror}); set another data.path") from None
    try:
        with exclusive(folder / _LOCK):
            scratch = folder / SCRATCH
            if (folder / MANIFEST).exists():
                shutil.rmtree(scratch, ignore_errors=True)
                yield None
                return
            ours = {SCRATCH, _LOCK, *(SPLITS if scratch.is_dir() else ())}
            if others := sorted({one.name for one in folder.iterdir()} - ours - _OF_FILE_SYSTEMS):
                raise DataError(
                    f"data.path={folder}: holds no {MANIFEST} but is not empty ({', '.join(others[:3])}); set data.path to a new folder"
                )
            for name in SPLITS:
                if (folder / name).exists():  # of a process that was killed while it published
                    (folder / name).rename(scratch / CONTENT / name)
            yield scratch
    finally:
        if not there:
            with contextlib.suppress(OSError):  # it holds something now
                folder.rmdir()


def publish(folder: Path) -> None:
    """Make what lies in the scratch folder the content of `folder`, its manifest last; the scratch folder goes."""
    content = folder / SCRATCH / CONTENT
    flush(content)
    for name in SPLITS:
        (content / name).rename(folder / name)
    sync_directory(folder)
    (content / MANIFEST).rename(folder / MANIFEST)
    sync_directory(folder)
    shutil.rmtree(folder / SCRATCH)


def flush(folder: Path) -> None:
    """Everything below `folder` is on the disk before its name says that it is complete."""
    for parent, _, files in os.walk(folder):
        for file in (file for file in files if not (Path(parent) / file).is_symlink()):  # a link is in its folder
            descriptor = os.open(Path(parent) / file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(parent))
