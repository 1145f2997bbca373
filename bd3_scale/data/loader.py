"""The rows of each global batch that one data-parallel replica works on, read ahead by a thread, their shards fetched by another.

The thread that reads also makes of the rows what its user wants to have ready (`prepare`).

Invariants: what is read is a function of (order, samples consumed, replica, replicas) alone - `samples_consumed` is the whole state;
the replicas' shares are disjoint and together the global batch, each row with its slot (its place in the batch, which keys its noise;
`Shares` says which are whose); where a share is short its last micro-batch is filled up with a row that it has; an error while
reading or preparing ahead is raised where that batch is asked for; closing leaves no thread behind; shards of the next windows are
opened ahead (from a remote, fetched first, and those of windows that are read are let go), by each process of a node in another order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from bd3_scale.batches import Shares
from bd3_scale.data.order import WHOLE, Share
from bd3_scale.errors import RecipeError
from bd3_scale.launcher import launched
from bd3_scale.recipe.stages import at_least, batch_schedule


class Order(Protocol):
    """Places of the run -> row numbers, and the shards they stand in; see GlobalOrder."""

    def sample_ids(self, position: int, count: int) -> np.ndarray: ...
    def window_places(self, position: int, count: int) -> np.ndarray: ...
    def shards(self, position: int, count: int, ahead: int, share: Share = ...) -> tuple[list[int], list[int]]: ...


class Rows(Protocol):
    """Rows by number; see ShardReader."""

    def __len__(self) -> int: ...
    def rows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray: ...


class TrainingRows(Rows, Protocol):
    """Rows whose shards may have to be fetched; see ShardReader."""

    def counts(self, indices: np.ndarray) -> np.ndarray: ...
    @property
    def fetches(self) -> bool: ...
    def fetch(self, shard: int, keep: Collection[int]) -> bool: ...
    def open_ahead(self, shard: int, needed: Collection[int]) -> None: ...
    def keep_open(self, shards: Collection[int]) -> None: ...


@dataclass(frozen=True)
class MicroBatch:
    """What one replica computes at a time: as many rows for every micro-batch of every replica."""

    slots: np.ndarray
    """int64 [m]: places in the global batch."""
    rows: np.ndarray
    """int64 [m, L]: token ids, the complements of those that do not count (`counted`)."""
    real: int
    """The first so many rows are this replica's; what follows is filler, a row of the replica once more, and counts nowhere."""


@dataclass(frozen=True)
class _Parts:
    """What of a global batch is a replica's."""

    slots: np.ndarray
    """int64 [share]."""
    places: np.ndarray
    """int64 [micro-batches, m]: which of them each micro-batch has."""
    real: list[int]

    @classmethod
    def of(cls, shares: Shares, replica: int) -> _Parts:
        parts = shares.slots(replica)
        slots = np.concatenate([np.asarray(part, np.int64) for part in parts])
        # Beyond its rows a replica computes its last one again: nothing more is read.
        places = np.arange(len(parts) * shares.micro_batch).reshape(len(parts), -1)
        return cls(slots, np.minimum(places, len(slots) - 1), [len(part) for part in parts])


class Loader:
    """This replica's share of global batches, `prefetch` of them read ahead (0: read when asked for)."""

    def __init__(
        self,
        reader: TrainingRows,
        order: Order,
        *,
        global_batch: Any,
        micro_batch: int | None,
        draws: int = 1,
        replica: int,
        replicas: int,
        prefetch: int = 2,
        download_ahead: int = 0,
        by_shard: bool = False,
        host: range | None = None,
        prepare: Callable[[int, list[MicroBatch], int], Any] | None = None,
    ) -> None:
        """`global_batch`: rows, or a schedule as `training.global_batch` has it. `micro_batch`: the most rows at a time. `draws`: rows that
        `global_batch` counts for each that is read. `download_ahead`: shards fetched and opened after those of the batches read ahead.
        `by_shard`: the rows of a batch stand in the order of their shards, so that a replica reads few of them. `host`: the replicas that
        share this host's folder (this one alone). `prepare`: (samples consumed, its micro-batches, tokens of the whole global batch
        that count) -> what `take` gives with them, made where they are read.

        Raises RecipeError where there are fewer rows than replicas.
        """
        self._batches = batch_schedule(global_batch, draws)
        if replicas > (fewest := self._batches.smallest):
            raise RecipeError(
                f"training.global_batch {fewest * draws} must be at least the {replicas} data-parallel replicas because each needs a row; "
                f"set training.global_batch={at_least(global_batch, replicas * draws)}"
            )
        if not 0 <= replica < replicas:
            raise ValueError(f"replica {replica} of {replicas}")
        self._parts = {phase.rows: _Parts.of(Shares(phase.rows, replicas, micro_batch), replica) for phase in self._batches.phases}
        self._reader, self._order, self._prefetch = reader, order, prefetch
        self._prepare = prepare
        self._ahead: dict[int, Future[tuple[list[MicroBatch], Any]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data-loader") if prefetch else None
        self._by_shard, self._host = by_shard, range(replica, replica + 1) if host is None else host
        self._replica, self._replicas = replica, replicas
        self._download_ahead, self._closing = download_ahead, threading.Event()
        self._downloader = ThreadPoolExecutor(1, thread_name_prefix="data-download") if reader.fetches or download_ahead else None
        self._downloading: Future[None] | None = None

    def micro_batches(self, samples_consumed: int) -> list[MicroBatch]:
        """This replica's micro-batches of the global batch that starts after `samples_consumed` samples of the run.

        Raises DataError where a row cannot be read.
        """
        return self.take(samples_consumed)[0]

    def take(self, samples_consumed: int) -> tuple[list[MicroBatch], Any]:
        """The same, and what `prepare` made of them (None without). Raises what that raises, too."""
        if self._downloader is not None and (self._downloading is None or self._downloading.done()):
            if self._downloading is not None:
                self._downloading.result()  # what it did not expect is not lost
            self._downloading = self._downloader.submit(self._download, samples_consumed)
        if self._thread is None:
            return self._make(samples_consumed)
        wanted = self._positions(samples_consumed)[:-1]
        for position in [position for position in self._ahead if position not in wanted]:
            self._ahead.pop(position).cancel()  # a jump: what was read ahead is of no use
        for position in wanted:
            if position not in self._ahead:
                self._ahead[position] = self._thread.submit(self._make, position)
        return self._ahead.pop(samples_consumed).result()

    def close(self) -> None:
        """End the threads, waiting for what is under way. The loader cannot be used any more."""
        self._closing.set()
        for thread in (self._thread, self._downloader):
            if thread is not None:
                thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _make(self, position: int) -> tuple[list[MicroBatch], Any]:
        batches, tokens = self._read(position)
        return batches, None if self._prepare is None else self._prepare(position, batches, tokens)

    def _positions(self, position: int) -> list[int]:
        """Where this global batch begins, those that are read ahead, and the one after them."""
        found = [position]
        for _ in range(self._prefetch + 1):
            found.append(found[-1] + self._batches.rows_after(found[-1]))
        return found

    def _read(self, position: int) -> tuple[list[MicroBatch], int]:
        batch = self._batches.rows_after(position)
        parts = self._parts[batch]
        ids = self._order.sample_ids(position, batch)
        if self._by_shard:
            ids = ids[np.argsort(self._order.window_places(position, batch), kind="stable")]
        rows = self._reader.rows(ids[parts.slots])
        made = [MicroBatch(parts.slots[places], rows[places], real) for places, real in zip(parts.places, parts.real, strict=True)]
        return made, int(self._reader.counts(ids).sum())

    def _download(self, position: int) -> None:
        """Let go of the shards that were read, fetch those that come, nearest first, as far as there is room, and open them."""
        coming = self._coming(position, range(self._replica, self._replica + 1))
        self._reader.keep_open(coming)
        if self._reader.fetches:
            of_host = self._coming(position, self._host)  # what one process of the host does not need another may
            for shard in of_host:
                if self._closing.is_set() or not self._reader.fetch(shard, of_host):
                    break
        # The processes of a node check different ones first, and then find those of the others checked.
        here = launched()
        first = len(coming) * here.local_rank // here.local_world_size
        for shard in coming[first:] + coming[:first]:
            if self._closing.is_set():
                return
            self._reader.open_ahead(shard, coming)

    def _coming(self, position: int, replicas: range) -> list[int]:
        """The shards of the batches that are read and of what comes after them, nearest first, that these replicas read."""
        share = WHOLE
        if self._by_shard:
            # How far a batch's rows are from an even draw of their window, times three: what lies beyond is opened when it is read.
            margin = 1.5 / math.sqrt(self._batches.smallest)
            share = (replicas.start / self._replicas - margin, replicas.stop / self._replicas + margin)
        needed, following = self._order.shards(position, self._positions(position)[-1] - position, self._download_ahead, share)
        return needed + following


def validation_rows(reader: Rows, count: int, replica: int, replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """Replica `replica`'s share of the first `count` held-out rows (fewer if there are fewer): rows that follow each other, so that it
    reads few shards.

    Returns (row_indices int64 [n], rows int64 [n, L]); shares differ by at most one row. The index keys the row's noise.
    """
    total = min(count, len(reader))
    indices = np.arange(total * replica // replicas, total * (replica + 1) // replicas, dtype=np.int64)
    return indices, reader.rows(indices)
