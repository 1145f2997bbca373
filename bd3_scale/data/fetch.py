"""Files of a data folder that live elsewhere: fetched into the local folder with mosaicml-streaming's downloaders.

`remote` is a folder or a URL (s3://, gs://, azure://, ... as streaming's CloudDownloader knows them). Invariants: a file appears
under its name only when it is complete and has passed its check; of several processes that need one file, one fetches it and the
others wait; a bad copy, found or fetched, is deleted and fetched again at most ATTEMPTS times, then it is an error, never a shorter epoch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from bd3_scale.data.lock import exclusive
from bd3_scale.data.streaming_compat import import_streaming
from bd3_scale.errors import DataError

ATTEMPTS = 3
TIMEOUT = 60.0
"""Seconds that a download may stand still."""


def fetch(remote: str, relative: str, local: Path, check: Callable[[Path], str | None]) -> None:
    """Make `local` a good copy of `remote`/`relative`. `check` says what is wrong with a file (None: nothing).

    Raises DataError naming the file, the remote and the last problem.
    """
    local.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(local.with_name(f".{local.name}.lock")):
        if local.exists() and check(local) is None:
            return  # another process was faster
        problem = "is missing"
        for _ in range(ATTEMPTS):
            local.unlink(missing_ok=True)
            fetched = _download(remote, relative, local, check)
            if fetched is None:
                return
            problem = fetched
        raise DataError(
            f"{local}: cannot be fetched from {remote} ({problem}, {ATTEMPTS} attempts); check data.remote and {relative} there"
        )


def _download(remote: str, relative: str, local: Path, check: Callable[[Path], str | None]) -> str | None:
    """One attempt, in a scratch folder of its own that is removed again; what went wrong, or None."""
    scratch = local.with_name(f".{local.name}.fetch")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed; the lock is ours
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
