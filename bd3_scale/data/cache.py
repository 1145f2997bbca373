"""The local folder of data that live elsewhere: what is needed is fetched into it, and what is not leaves it when room is short.

All processes of a node share the folder. Whoever fetches or evicts holds the one lock of the folder, so a file is fetched once and a
bound is kept together; a training reads far less than one download gives, so taking turns costs nothing. A process holds a shared
lock on every shard that it has open, and an evictor takes only what it can lock alone. Files are fetched with mosaicml-streaming's
downloaders; `remote` is a folder or a URL (s3://, gs://, azure://, ... as its CloudDownloader knows them).

Invariants: with a `limit`, files of the folder never take more bytes than that, the one that is being fetched included; a shard that
any process has open is never evicted; of the others the one opened longest ago goes first; what a killed process left (its lock, its
scratch folder) is removed by the next one that fetches, and at every start `manifest` does; a file appears under its name only when it is
complete and has passed its check; a bad copy, found or fetched, is deleted and fetched again at most ATTEMPTS times, then it is an error,
never a shorter epoch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from bd3_scale.data.formats.streaming_compat import import_streaming
from bd3_scale.data.lock import exclusive
from bd3_scale.data.manifest import MANIFEST, Manifest
from bd3_scale.errors import DataError

LOCK, SCRATCH, LATEST = ".fetch.lock", ".fetch", f".remote-{MANIFEST}"
_Used = TypeVar("_Used")
PATIENCE = 30.0
"""Seconds to wait for others to let go of shards where there is no room."""
ATTEMPTS = 3
TIMEOUT = 60.0
"""Seconds that a download may stand still."""
Check = Callable[[Path], str | None]
"""What is wrong with a file; None: nothing."""


class Cache:
    """The folder `folder` of copies of what stands at `remote`; paths of files are relative to both."""

    def __init__(self, folder: Path, remote: str, limit: int | None = None) -> None:
        """`limit`: bytes that the folder may hold; None: no bound."""
        self.folder, self.remote, self.limit = folder, remote, limit
        self._client: Any = None
        """streaming's downloader, once there is one: to make a client of a store takes a second. One that has failed is not used again."""

    def manifest(self) -> Manifest:
        """The manifest at the remote, put into the folder where that has none. Raises DataError where the folder holds other data."""
        local, latest = self.folder / MANIFEST, self.folder / LATEST
        if os.path.isdir(self.remote) and self.folder.is_dir() and os.path.samefile(self.remote, self.folder):
            raise DataError(f"{self.folder}: is data.remote itself, whose files a cache would delete; set data.remote=null")
        with self._locked():
            self._fetch(MANIFEST, latest, _manifest_problem)
            manifest = Manifest.load(latest)
            if not local.exists() or _manifest_problem(local) is not None:
                latest.replace(local)
            else:
                latest.unlink()
                if Manifest.load(local).fingerprint != manifest.fingerprint:
                    raise DataError(
                        f"{self.folder}: holds other data than data.remote={self.remote}; set data.path to a new folder, to be its copy"
                    )
            self._make_room(0, ())  # the bound may be smaller than it was
        return manifest

    def fetch(self, relative: str, size: int, check: Check, keep: Collection[str]) -> bool:
        """Put a good copy of a file of `size` bytes at its place, ahead of need; False, and nothing, where there is no room for it.

        `keep`: files that are not evicted for it. Raises DataError where the file cannot be had.
        """
        with self._present(relative, size, check, keep) as there:
            return there

    def fetch_needed(self, relative: str, size: int, check: Check, use: Callable[[], _Used], let_go: Callable[[], None]) -> _Used:
        """The same for a file that is needed now; returns `use()`, called before anybody could evict the file again.

        Where there is no room `let_go` is called, and others are waited for. Raises DataError where the file or room cannot be had.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            with self._present(relative, size, check, ()) as there:
                if there:
                    return use()
            let_go()
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.folder / relative}: needs {size} bytes, but shards in use fill data.cache_bytes={self.limit}; "
                    "set a larger data.cache_bytes, and another data.path for each job"
                )
            time.sleep(0.05)

    @contextlib.contextmanager
    def _present(self, relative: str, size: int, check: Check, keep: Collection[str]) -> Iterator[bool]:
        """Hold the lock of the folder with a good copy of the file in it, or with False where there is no room for one."""
        local = self.folder / relative
        with self._locked():
            if local.exists() and check(local) is None:  # another process was faster
                yield True
                return
            local.unlink(missing_ok=True)
            room = self._make_room(size, keep)
            if room:
                self._fetch(relative, local, check)
            yield room

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder. Raises DataError where the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(self.folder / LOCK):
                shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)  # of a process that was killed: the lock is ours
                yield
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written ({error}); free space, or set data.path to a folder that can") from None

    def note_use(self, descriptor: int) -> None:
        """Keep an open shard from being evicted until it is closed, and let it be the last that would be."""
        if self.limit is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with contextlib.suppress(OSError):  # a file of another user: it is evicted a little early, that is all
                os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))

    def _make_room(self, size: int, keep: Collection[str]) -> bool:
        if self.limit is None:
            return True
        files = [(entry.stat(), Path(entry.path)) for folder in _folders(self.folder) for entry in os.scandir(folder) if entry.is_file()]
        excess = sum(status.st_size for status, _ in files) + size - self.limit
        for status, path in sorted(files, key=lambda file: (max(file[0].st_atime_ns, file[0].st_mtime_ns), file[1])):
            if excess <= 0:
                break
            evictable = path.parent != self.folder and path.suffix != ".json" and str(path.relative_to(self.folder)) not in keep
            if evictable and _removed(path):
                excess -= status.st_size
        return excess <= 0

    def _fetch(self, relative: str, local: Path, check: Check) -> None:
        """Put a good copy of `relative` at `local`, in place of what is there. The caller holds the lock of the folder. Raises DataError
        naming the file, the remote and the last problem."""
        local.parent.mkdir(parents=True, exist_ok=True)
        problem: str | None = "is missing"
        for _ in range(ATTEMPTS):
            local.unlink(missing_ok=True)
            problem = self._download(relative, local, check)
            if problem is None:
                return
        where = f"cannot be fetched from {self.remote} ({problem}, {ATTEMPTS} attempts); check data.remote and {relative} there"
        raise DataError(f"{local}: {where}")

    def _download(self, relative: str, local: Path, check: Check) -> str | None:
        """One attempt; what went wrong, or None."""
        scratch = self.folder / SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        scratch.mkdir()
        try:
            target, remote = scratch / local.name, f"{self.remote.rstrip('/')}/{relative}"
            try:
                if self._client is None:
                    self._client = import_streaming("streaming.base.storage.download").CloudDownloader.get(remote)
                self._client.download(remote, str(target), TIMEOUT)
            except Exception as error:  # every store's client raises its own kinds; the text reaches the user through DataError
                self._client = None
                return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            problem = "nothing arrived" if not target.exists() else check(target)
            if problem is None:
                target.replace(local)
            return problem
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _manifest_problem(path: Path) -> str | None:
    try:
        Manifest.load(path)
    except DataError as error:
        return str(error)
    return None


def _folders(folder: Path) -> list[Path]:
    return [folder, *(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))]


def _removed(path: Path) -> bool:
    """Remove a file unless somebody has it open."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
