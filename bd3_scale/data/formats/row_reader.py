"""Random access to the rows of a data folder, whatever they are stored in, every byte checked before it is used.

Invariants:
- a manifest, index or shard that is missing, cut or changed in one bit is a DataError of one line, at the latest when its first row is
  asked for; there is no other outcome, and nothing is skipped;
- size and xxh64 hash of a shard are checked whenever it is opened, by one process of a node for all (checked_once.py), and each row must
  be what it was then (checked_rows.py);
- at most `open_shards` files are open; a shard in use costs the checksums of its rows, not its content;
- rows are those of the expected context, tokenizer and vocabulary, and no id is outside the vocabulary (so MASK never comes from data);
- with a `cache`, missing and bad files are fetched into the folder (cache.py); without one nothing is written, it may be read-only.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from bd3_scale.data.cache import Cache
from bd3_scale.data.checked_once import Checked, finding, keep
from bd3_scale.data.counted import ids
from bd3_scale.data.formats.adopted import AdoptedIndex
from bd3_scale.data.formats.checked_rows import ChangedError
from bd3_scale.data.formats.mds import MDSIndex, MDSRows, xxh64
from bd3_scale.data.formats.tar import TarIndex, TarRows
from bd3_scale.data.manifest import ADOPTED, MANIFEST, PREPARE_AGAIN, FileEntry, Manifest, Split
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.errors import DataError


class RowWriter(Protocol):
    """What writes the shards of one split; see MDSRows."""

    def write(self, rows: np.ndarray) -> None: ...
    def finish(self) -> tuple[FileEntry, tuple[FileEntry, ...]]: ...
    def abort(self) -> None: ...


class OpenShard(Protocol):
    """One open shard: `rows(numbers)` gives [n, L] of the stored dtype."""

    def rows(self, numbers: np.ndarray) -> np.ndarray: ...


class Index(Protocol):
    """The index of a split, checked against its manifest; opens shards over file descriptors."""

    def check(self, shard: int, content: bytes) -> Checked: ...
    def open(self, shard: int, descriptor: int, checked: Checked) -> OpenShard: ...


WRITERS: dict[str, Callable[[Path, int, str, int], RowWriter]] = {"mds": MDSRows, "webdataset": TarRows}
"""Format -> writer of rows; called with an existing, empty folder, the context, the dtype and the largest size of a shard in bytes."""
INDEXES: dict[str, Callable[[bytes, Path, Manifest, Split], Index]] = {"mds": MDSIndex, "webdataset": TarIndex, ADOPTED: AdoptedIndex}
"""Format -> reader of an index; called with its content, the folder of the split, the manifest and its split."""


class ShardReader:
    """The rows of one split of a data folder, numbered through its shards. Safe to use from several threads."""

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        context: int,
        tokenizer: Tokenizer,
        cache: Cache | None = None,
        manifest: Manifest | None = None,
        open_shards: int = 32,
    ) -> None:
        """Read and check manifest and index. `cache`: of `folder`, if it is one; `manifest`: if it is loaded. Raises DataError."""
        self.manifest = Manifest.load(folder / MANIFEST) if manifest is None else manifest
        self.manifest.require(folder, context=context, tokenizer=tokenizer)
        self._split_name, self._split = split, self.manifest.split(split)
        self._folder, self._cache, self._open_limit = folder / split, cache, max(1, open_shards)
        self.context = context
        self.shard_rows: list[int] = [shard.rows for shard in self._split.shards]
        """Rows of each shard, in order."""
        self._first_row = np.concatenate([[0], np.cumsum(self.shard_rows, dtype=np.int64)])
        self._lock = threading.RLock()
        self._open: OrderedDict[int, tuple[int, OpenShard]] = OrderedDict()
        descriptor, content = self._checked_file(self._split.index)
        os.close(descriptor)
        self._counts: np.ndarray | None = None
        if self._split.counts is not None:
            descriptor, counts = self._checked_file(self._split.counts)
            os.close(descriptor)
            self._counts = np.frombuffer(counts, "<u4")
        self._index = INDEXES[self.manifest.format](content, self._folder, self.manifest, self._split)
        if cache is None:
            self._require_files([shard.file for shard in self._split.shards])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all files. The reader stays usable."""
        self.keep_open(())

    def keep_open(self, shards: Collection[int]) -> None:
        """Close all files but those of `shards`: a bounded cache may let them go."""
        with self._lock:
            for shard in [shard for shard in self._open if shard not in shards]:
                os.close(self._open.pop(shard)[0])

    @property
    def fetches(self) -> bool:
        """Whether shards come from elsewhere."""
        return self._cache is not None

    def fetch(self, shard: int, keep: Collection[int]) -> bool:
        """Make sure that the folder holds a shard, ahead of need; the bounded cache keeps those numbered `keep` meanwhile.

        False where it has no room, or where the shard cannot be had: that is an error when it is needed, and not before.
        """
        entry = self._split.shards[shard]
        if self._cache is None or (self._folder / entry.file).exists():
            return True
        names = {self._relative(self._split.shards[other]) for other in keep}
        try:
            return self._cache.fetch(self._relative(entry), entry.bytes, lambda file: _problem(file, entry), names)
        except DataError:
            return False

    def require_room(self, count: int) -> None:
        """Raises DataError where the bounded cache cannot hold any `count` shards of this split beside all else that it must hold."""
        limit = None if self._cache is None else self._cache.limit
        if limit is None:
            return
        other = self.manifest.train if self._split_name == "validation" else self.manifest.validation
        needed = 2 * len(self.manifest.to_bytes()) + self._split.index.bytes + other.index.bytes
        needed += sum(split.counts.bytes for split in (self._split, other) if split.counts is not None)
        for split, at_once in ((self._split, count), (other, 2)):
            needed += sum(sorted(shard.bytes for shard in split.shards)[-at_once:])
        if needed > limit:
            raise DataError(
                f"{self._folder}: up to {count} shards are read at a time, which with the rest are {needed} bytes, but data.cache_bytes "
                f"is {limit}; set data.cache_bytes={needed} or more, better twice that"
            )

    def rows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows numbered `indices` (any order, repeats allowed): int64 [n, L]; tokens that do not count as `counted` has them.

        Raises IndexError for a number outside the split, DataError for a file that is missing or not what the manifest says.
        """
        numbers = np.asarray(indices, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {self._folder}, which has {len(self)}")
        shards = np.searchsorted(self._first_row, numbers, side="right") - 1
        result = np.empty((len(numbers), self.context), np.int64)
        with self._lock:
            for shard in np.unique(shards):
                chosen = np.flatnonzero(shards == shard)
                result[chosen] = self._rows_of(int(shard), numbers[chosen] - self._first_row[shard])
        if result.size and (largest := ids(result).max()) >= self.manifest.vocabulary_size:
            raise DataError(
                f"{self._folder}: has token id {largest}, outside the vocabulary of {self.manifest.vocabulary_size}; {PREPARE_AGAIN}"
            )
        return result

    def counts(self, indices: np.ndarray) -> np.ndarray:
        """How many tokens of the rows numbered `indices` count: int64 [n]. Reads no shard."""
        if self._counts is None:
            return np.full(len(indices), self.context - 1, np.int64)
        return self._counts[indices].astype(np.int64)

    def verify(self) -> None:
        """Check every file of the split, whether it was opened before or not. Raises DataError."""
        for shard in self._split.shards:
            descriptor, _ = self._checked_file(shard)
            os.close(descriptor)

    def _rows_of(self, shard: int, numbers: np.ndarray) -> np.ndarray:
        try:
            return self._shard(shard).rows(numbers)
        except ChangedError:
            self.keep_open(self._open.keys() - {shard})
            return self._shard(shard, afresh=True).rows(numbers)  # says what is wrong with the file, or fetches it

    def _shard(self, shard: int, afresh: bool = False) -> OpenShard:
        """Shard number `shard`, open, the most recently used of those that are. `afresh`: believe nothing that was found before."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard][1]
        while len(self._open) >= self._open_limit:
            os.close(self._open.popitem(last=False)[1][0])
        self._open[shard] = self._opened(shard, afresh)
        return self._open[shard][1]

    def open_ahead(self, shard: int, needed: Collection[int]) -> None:
        """Open and check a shard before it is needed, unless one of those numbered `needed` would be closed for it. What is wrong with it
        is an error when it is needed, and not before. A bounded cache may want to let it go until then: there it is not opened."""
        if self._cache is not None and (self._cache.limit is not None or not (self._folder / self._split.shards[shard].file).exists()):
            return
        with self._lock:
            if shard in self._open or (len(self._open) >= self._open_limit and self._open.keys() <= set(needed)):
                return
        try:
            opened = self._opened(shard)
        except DataError:
            return
        with self._lock:
            idle = [other for other in self._open if other not in needed]
            if len(self._open) >= self._open_limit and idle:
                os.close(self._open.pop(idle[0])[0])
            if shard in self._open or len(self._open) >= self._open_limit:
                os.close(opened[0])
            else:
                self._open[shard] = opened

    def _opened(self, shard: int, afresh: bool = False) -> tuple[int, OpenShard]:
        """A descriptor of a shard that has passed its check, and what reads it; fetched first where that is needed and possible."""
        entry = self._split.shards[shard]
        path = self._folder / entry.file
        with finding(path, entry) as checked:
            descriptor = None
            if checked is not None and not afresh:
                with contextlib.suppress(OSError):  # let go by another process meanwhile, or unreadable: as if it had not been checked
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if descriptor is None:
                checked = None
                descriptor, content = self._checked_file(entry)
            try:
                if checked is None:
                    checked = self._index.check(shard, content)
                    keep(path, entry, checked)
                elif self._cache is not None:
                    self._cache.note_use(descriptor)
                return descriptor, self._index.open(shard, descriptor, checked)
            except BaseException:
                os.close(descriptor)
                raise

    def _checked_file(self, entry: FileEntry) -> tuple[int, bytes]:
        """An open descriptor of a file of the split and its content, both checked; fetched first where that is needed and possible."""
        path, cache = self._folder / entry.file, self._cache
        descriptor, content, problem = _read_checked(path, entry, cache)
        if problem is not None and cache is not None:
            descriptor, content, problem = cache.fetch_needed(
                self._relative(entry),
                entry.bytes,
                check=lambda file: _problem(file, entry),
                use=lambda: _read_checked(path, entry, cache),
                let_go=self.close,  # what this process has open may be what fills the cache
            )
        if problem is not None:
            cure = "prepare the folder again" if cache is None else "check data.remote"
            raise DataError(f"{path}: {problem}; restore it or {cure}")
        return descriptor, content

    def _relative(self, entry: FileEntry) -> str:
        return f"{self._split_name}/{entry.file}"

    def _require_files(self, names: list[str]) -> None:
        """One look at the folder, so that a missing shard is known before the first step and not hours later."""
        missing = sorted(set(names) - set(os.listdir(self._folder)))
        if missing:
            share = f"{len(missing)} of {len(names)} shards are"
            raise DataError(f"{self._folder / missing[0]}: is missing ({share}); restore it, set data.remote or prepare the folder again")


def _problem(path: Path, entry: FileEntry) -> str | None:
    """What is wrong with the file at `path` that should be `entry`; None: nothing."""
    descriptor, _, problem = _read_checked(path, entry)
    if descriptor >= 0:
        os.close(descriptor)
    return problem


def _read_checked(path: Path, entry: FileEntry, cache: Cache | None = None) -> tuple[int, bytes, str | None]:
    """(descriptor, content, problem); where there is a problem the file is closed again and the descriptor is -1."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1, b"", "is missing"
    except OSError as error:
        return -1, b"", f"cannot be read ({error.strerror})"
    problem, content = None, b""
    try:
        if cache is not None:
            cache.note_use(descriptor)
        size = os.fstat(descriptor).st_size
        if size != entry.bytes:
            problem = f"has {size} bytes instead of {entry.bytes} (truncated or replaced)"
        else:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                content = file.read()
            if (found := xxh64(content)) != entry.xxh64:
                problem = f"is damaged, its xxh64 is {found} instead of {entry.xxh64}"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem is not None:
        os.close(descriptor)
        return -1, b"", problem
    return descriptor, content, None
