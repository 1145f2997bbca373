"""Copies finished checkpoints to a remote folder (s3://, gs:// ... through fsspec), behind the back of the training.

A thread on every rank uploads the file that this rank wrote, one checkpoint at a time; the leader's waits until all files stand there,
uploads the index after them and the remote `latest` last, so what the remote `latest` names is whole. Invariants: `offer` never waits;
where uploads are slower than saves the newest waiting checkpoint takes the place of an older waiting one (which is said); an upload that
fails is tried again a few times, then reported (never with the credentials in a URL), and nothing else happens to the run. Nothing
remote is ever deleted, unless `checkpoint.remote_keep` says how many stay. What is there is fetched again by fetch.py.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import fsspec

from bd3_scale.checkpoint.index import INDEX_NAME, RECIPE_NAME, parse
from bd3_scale.checkpoint.reader import LARGEST_INDEX, STEP_NAME
from bd3_scale.checkpoint.shard_files import read_text
from bd3_scale.checkpoint.store import LATEST_NAME
from bd3_scale.errors import CheckpointError, without_credentials
from bd3_scale.messages import log

ATTEMPTS = 4
PAUSE = 5.0
"""Seconds before the second attempt, each further one waits twice as long; and between two looks for the files of other ranks."""
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "oci", "oss"))
"""They have no folders to be made; asked for one, s3fs would make a *bucket* that is missing, of a name that was written wrong."""
STALLED = 3600.0
"""Seconds without a new file after which those of other ranks are not waited for any more; a minute where another checkpoint waits."""


def check_url(url: str) -> None:
    """Raise CheckpointError where no program here speaks the url's protocol. Connects to nothing."""
    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"checkpoint.remote={url} cannot be written: {error}; install what it names or use another url") from error


MARK = ".sha256"
"""Of a small file beside each of a checkpoint's: what its content is, written when it is whole. A run that was set back saves a step again,
whose files have the names and sizes of those that stand there."""


def put(folder: Path, url: str, names: Collection[str]) -> None:
    """Copy files of a checkpoint folder to `url`/NAME, and say of each what it is. Raises whatever the file system raises."""
    filesystem, root = fsspec.core.url_to_fs(url)
    target = f"{root.rstrip('/')}/{folder.name}"
    if OBJECT_STORES.isdisjoint([filesystem.protocol] if isinstance(filesystem.protocol, str) else filesystem.protocol):
        filesystem.makedirs(target, exist_ok=True)
    files = parse(read_text(folder / INDEX_NAME, LARGEST_INDEX)).files
    for name in sorted(names):
        filesystem.put_file(str(folder / name), f"{target}/{name}")
        if name in files:
            filesystem.pipe_file(f"{target}/{name}{MARK}", files[name].sha256.encode())


def withdraw(folder: Path, url: str) -> None:
    """Delete the index of an earlier checkpoint of this name at `url`, whose files are about to be replaced."""
    filesystem, root = fsspec.core.url_to_fs(url)
    index = f"{root.rstrip('/')}/{folder.name}/{INDEX_NAME}"
    if filesystem.exists(index):
        filesystem.rm_file(index)


def publish(folder: Path, url: str) -> None:
    """Copy the index, whose files are all there, and let `url`/latest name the checkpoint."""
    put(folder, url, [INDEX_NAME])
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(f"{root.rstrip('/')}/{LATEST_NAME}", f"{folder.name}\n".encode())


def missing(folder: Path, url: str) -> list[str]:
    """The files that the index of a checkpoint names and that do not stand at `url`/NAME, whole and with that content."""
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    target = f"{root.rstrip('/')}/{folder.name}"
    found: dict[str, Any] = {Path(one["name"]).name: one["size"] for one in filesystem.ls(target, detail=True)}
    files = parse(read_text(folder / INDEX_NAME, LARGEST_INDEX)).files
    marked = [f"{target}/{name}{MARK}" for name, record in files.items() if found.get(name) == record.bytes and f"{name}{MARK}" in found]
    marks: dict[str, bytes] = filesystem.cat(marked, on_error="omit") if marked else {}
    whole = {Path(path).name: mark.decode("ascii", "replace") for path, mark in marks.items()}
    return sorted(name for name, record in files.items() if whole.get(f"{name}{MARK}") != record.sha256)


def prune(url: str, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` whole checkpoints at `url` up to the one that its `latest` names, and older ones that never became
    whole; those of multiples of `keep_every` stay. Raises whatever the file system raises."""
    filesystem, root = fsspec.core.url_to_fs(url)
    root = root.rstrip("/")
    filesystem.invalidate_cache()
    latest = STEP_NAME.fullmatch(filesystem.cat_file(f"{root}/{LATEST_NAME}", start=0, end=1000).decode("ascii", "replace").strip())
    if latest is None:
        return  # as of a local folder: nothing is deleted beside a name that says nothing
    newest = int(latest[1])
    found = (STEP_NAME.fullmatch(Path(one).name) for one in filesystem.ls(root, detail=False))
    steps = {int(name[1]): name[0] for name in found if name is not None}
    kept = 0
    for step, name in sorted(((step, name) for step, name in steps.items() if step <= newest), reverse=True):
        whole = filesystem.exists(f"{root}/{name}/{INDEX_NAME}")
        kept += whole
        if (whole and kept <= keep) or step == newest or (keep_every > 0 and step % keep_every == 0):
            continue
        if whole:
            filesystem.rm_file(f"{root}/{name}/{INDEX_NAME}")  # first: what is half deleted must not look whole
        filesystem.rm(f"{root}/{name}", recursive=True)


class Uploader:
    """Uploads what it is offered. `warn` is called from its thread with one line. `leads`: it uploads the recipe as well, and publishes
    what all have uploaded, of which `keep` and `keep_every` stay (see `prune`; 0: all)."""

    def __init__(self, url: str, warn: Callable[[str], None], *, leads: bool = True, keep: int = 0, keep_every: int = 0) -> None:
        self.url, self.leads, self.keep, self.keep_every = url, leads, keep, keep_every
        self._warn: Callable[[str], None] = lambda text: warn(without_credentials(text))
        self._waiting: tuple[Path, list[str]] | None = None
        self._current: Path | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="checkpoint upload", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> set[Path]:
        """Checkpoint folders that must not be deleted yet."""
        with self._changed:
            return {path for path in (self._current, self._waiting and self._waiting[0]) if path is not None}

    def offer(self, folder: Path, names: Collection[str]) -> None:
        """`names`: the files of this rank."""
        mine = [*names, *([RECIPE_NAME] if self.leads else [])]
        with self._changed:
            passed, self._waiting = self._waiting, (folder, mine)
            self._changed.notify_all()
        if passed is not None and passed[0] != folder:
            self._warn(f"{passed[0].name} is not uploaded to {self.url}: uploads are slower than saves, and {folder.name} is newer")

    def close(self, seconds: float) -> None:
        """Wait up to `seconds` for what is under way; say so where that is not enough."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        if self._thread.is_alive():
            names = ", ".join(sorted(path.name for path in self.busy))
            self._warn(f"{names} is not whole at {self.url} ({seconds:.0f} s were not enough); the local checkpoint is")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                if self._waiting is None:
                    return
                (self._current, names), self._waiting = self._waiting, None
            folder = self._current
            if self.leads and not self._tried(folder, lambda: withdraw(folder, self.url)):  # noqa: B023
                continue
            if self._tried(folder, lambda: put(folder, self.url, names)) and self.leads and self._all_are_there(folder):  # noqa: B023
                self._tried(folder, lambda: publish(folder, self.url))  # noqa: B023
                if self.keep:
                    self._tried(folder, lambda: prune(self.url, self.keep, self.keep_every), "older ones could not be deleted at")

    def _tried(self, folder: Path, action: Callable[[], None], what: str = "it could not be uploaded to") -> bool:
        """Whether one of a few attempts succeeded."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                action()
                return True
            except Exception as error:  # each of fsspec's file systems raises classes of its own
                cause = f"{type(error).__name__}: {error}"
            if not self.leads and not folder.exists():
                return False  # the leader has gone on to another, and said so
            with self._changed:
                if attempt < ATTEMPTS and self._waiting is None:
                    self._changed.wait_for(lambda: self._closing or self._waiting is not None, PAUSE * 2 ** (attempt - 1))
        text = f"{folder.name}: {what} {self.url} ({ATTEMPTS} attempts; {cause}); the local checkpoint is whole"
        if self.leads:
            self._warn(text)
        else:  # of other ranks nobody writes down what is wrong, and the leader knows only that files are missing
            log.warning(f"on host {socket.gethostname()}: {without_credentials(text)}")
        return False

    def _all_are_there(self, folder: Path) -> bool:
        """Wait until the other ranks have uploaded their files."""
        before, since, cause = -1, time.monotonic(), ""
        while True:
            try:
                left = missing(folder, self.url)
                cause = f"{len(left)} files are missing, {left[0]} first" if left else ""
            except Exception as error:  # each of fsspec's file systems raises classes of its own
                left, cause = ["?"], f"{type(error).__name__}: {error}"
            if not left:
                return True
            if len(left) != before:
                before, since = len(left), time.monotonic()
            with self._changed:
                newer = self._waiting is not None
                if time.monotonic() - since > (min(60.0, STALLED) if newer else STALLED):
                    break
                self._changed.wait_for(lambda: False, PAUSE)
        self._warn(f"{folder.name} is not whole at {self.url} ({cause}); the local checkpoint is")
        return False
