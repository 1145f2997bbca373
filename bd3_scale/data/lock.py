"""A lock between processes that leaves no file behind and dies with its holder.

`flock` on a file that the holder removes before it lets go. Invariant: a process that got the lock holds the file that
the path names at that moment; one that was waiting for a removed file notices and starts again. A killed holder's lock
is released by the kernel, and the file it left is taken over by the next one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bd3_scale.errors import DataError


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock named `path` (a file in an existing folder), waiting for as long as another process has it. Raises DataError."""
    descriptor = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise DataError(
                f"{path}: this lock file cannot be created ({error.strerror}); make its folder writable or set another data.path"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:  # removed by the holder we waited for
            pass
        except OSError as error:
            os.close(descriptor)
            raise DataError(f"cannot lock {path} ({error.strerror}); set data.path to a folder on a file system with locks") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
