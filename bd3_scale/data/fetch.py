"""Files of a data folder that live elsewhere, fetched with mosaicml-streaming's downloaders.

`remote` is a folder or a URL (s3://, gs://, azure://, ... as streaming's CloudDownloader knows them). Invariants: a file appears
under its name only when it is complete and has passed its check; a bad copy, found or fetched, is deleted and fetched again at most
ATTEMPTS times, then it is an error, never a shorter epoch. The caller holds the lock of the folder (cache.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from bd3_scale.data.formats.streaming_compat import import_streaming
from bd3_scale.errors import DataError

ATTEMPTS = 3
TIMEOUT = 60.0
"""Seconds that a download may stand still."""

Check = Callable[[Path], str | None]
"""What is wrong with a file; None: nothing."""


def fetch(remote: str, relative: str, local: Path, scratch: Path, check: Check) -> None:
    """Put a good copy of `remote`/`relative` at `local`, in place of what is there. `scratch`: a folder to work in, made and removed here.

    Raises DataError naming the file, the remote and the last problem.
    """
    local.parent.mkdir(parents=True, exist_ok=True)
    problem: str | None = "is missing"
    for _ in range(ATTEMPTS):
        local.unlink(missing_ok=True)
        problem = _download(remote, relative, local, scratch, check)
        if problem is None:
            return
    raise DataError(f"{local}: cannot be fetched from {remote} ({problem}, {ATTEMPTS} attempts); check data.remote and {relative} there")


def _download(remote: str, relative: str, local: Path, scratch: Path, check: Check) -> str | None:
    """One attempt; what went wrong, or None."""
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir()
    try:
        target = scratch / local.name
        downloader = import_streaming("streaming.base.storage.download").CloudDownloader
        try:
            downloader.direct_download(f"{remote.rstrip('/')}/{relative}", str(target), TIMEOUT)
        except Exception as error:  # every store's client raises its own kinds; the text reaches the user through DataError
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        problem = "nothing arrived" if not target.exists() else check(target)
        if problem is None:
            target.replace(local)
        return problem
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
