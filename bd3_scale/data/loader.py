"""The rows of each global batch that one data-parallel replica works on, read ahead by a thread.

Invariants: what is read is a function of (order, samples consumed, replica, replicas) alone - `samples_consumed` is the whole state;
the replicas' shares are disjoint and together the global batch, each row with its slot (its place in the batch, which keys its noise);
micro-batch j of replica r holds slots j * micro_batch * replicas + r * micro_batch + i, so that the j-th micro-batches of all replicas
stand side by side; an error while reading ahead is raised where that batch is asked for; closing leaves no thread behind.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from bd3_scale.data.order import GlobalOrder
from bd3_scale.data.shards import ShardReader
from bd3_scale.errors import RecipeError


@dataclass(frozen=True)
class MicroBatch:
    """What one replica computes at a time."""

    slots: np.ndarray
    """int64 [m]: places in the global batch."""
    rows: np.ndarray
    """int64 [m, L]: token ids."""


class Loader:
    """This replica's share of global batches, `prefetch` of them read ahead (0: read when asked for)."""

    def __init__(
        self,
        reader: ShardReader,
        order: GlobalOrder,
        *,
        global_batch: int,
        micro_batch: int,
        replica: int,
        replicas: int,
        prefetch: int = 2,
    ) -> None:
        """Raises RecipeError where the micro-batches of all replicas do not divide the global batch."""
        if global_batch % (micro_batch * replicas):
            raise RecipeError(
                f"training.global_batch {global_batch} must be a multiple of parallel.micro_batch {micro_batch} x {replicas} "
                "data-parallel replicas because every replica computes whole micro-batches; set training.global_batch"
            )
        if not 0 <= replica < replicas:
            raise ValueError(f"replica {replica} of {replicas}")
        side_by_side = np.arange(0, global_batch, micro_batch * replicas)[:, None]
        self._slots = (side_by_side + replica * micro_batch + np.arange(micro_batch)).astype(np.int64)
        self._reader, self._order, self._global_batch, self._prefetch = reader, order, global_batch, prefetch
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data-loader") if prefetch else None

    def micro_batches(self, samples_consumed: int) -> list[MicroBatch]:
        """This replica's micro-batches of the global batch that starts after `samples_consumed` samples of the run.

        Raises DataError where a row cannot be read.
        """
        if self._thread is None:
            return self._read(samples_consumed)
        wanted = [samples_consumed + step * self._global_batch for step in range(self._prefetch + 1)]
        for position in [position for position in self._ahead if position not in wanted]:
            self._ahead.pop(position).cancel()  # a jump: what was read ahead is of no use
        for position in wanted:
            if position not in self._ahead:
                self._ahead[position] = self._thread.submit(self._read, position)
        return self._ahead.pop(samples_consumed).result()

    def close(self) -> None:
        """End the thread, waiting for the read that is under way. The loader cannot be used any more."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _read(self, position: int) -> list[MicroBatch]:
        samples = self._order.sample_ids(position, self._global_batch)
        rows = self._reader.rows(samples[self._slots.ravel()]).reshape(*self._slots.shape, -1)
        return [MicroBatch(slots, share) for slots, share in zip(self._slots, rows, strict=True)]


def validation_rows(reader: ShardReader, count: int, replica: int, replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """Replica `replica`'s share of the first `count` held-out rows (fewer if there are fewer): every `replicas`-th of them.

    Returns (row_indices int64 [n], rows int64 [n, L]); shares differ by at most one row. The index keys the row's noise.
    """
    indices = np.arange(replica, min(count, len(reader)), replicas, dtype=np.int64)
    return indices, reader.rows(indices)
