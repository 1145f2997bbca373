"""Which sample stands at which place of the run: the global order, a pure function of (seed, epoch).

Every epoch visits every row once. The shards are taken in an order of their own each epoch, `window` of them at a time, and the
rows of such a window are permuted together: whoever reads the order from anywhere needs `window` shards at hand, not the data set.
Nothing depends on ranks, workers or restarts; a run's place in the data is one number, `position`, the samples consumed so far.

Random numbers are the raw words of Philox, keyed by (seed, purpose, epoch[, window]), and a permutation is their stable argsort:
NumPy promises that raw words never change, but not what its `permutation` makes of them.
Purposes used here: shard order (epoch); row order (epoch, window).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bd3_scale.errors import DataError
from bd3_scale.keyed_random import generator

if TYPE_CHECKING:
    from bd3_scale.data.loader import Order

_Kept = TypeVar("_Kept")
Share = tuple[float, float]
"""From where to where, as fractions of a window's rows; what lies outside of [0, 1] is nothing."""
WHOLE: Share = (0.0, 1.0)


@dataclass(frozen=True)
class _Epoch:
    shards: np.ndarray
    """Shard numbers in the order of the epoch."""
    starts: np.ndarray
    """Place in the epoch of the first sample of each window, and the end: int64 [windows + 1]."""


@dataclass(frozen=True)
class _Window:
    """The samples of one window in the order of the run."""

    ids: np.ndarray
    """int64 [samples]."""
    shard: np.ndarray
    """The shard of each, counted from the window's first one: int32 [samples]."""
    starts: np.ndarray
    """Where each shard of the window begins, as a fraction of the window's rows: float64 [shards]."""


class GlobalOrder:
    """Places -> sample ids (row numbers through `shard_rows`). O(shards + rows of a window) time and memory to jump anywhere.

    Safe to use from several threads.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, window: int) -> None:
        """`shard_rows`: rows of each shard; `window`: shards that are shuffled together. Raises DataError where there are no rows."""
        self._rows = np.asarray(shard_rows, np.int64)
        self._first_row = np.concatenate([[0], np.cumsum(self._rows)]).astype(np.int64)
        self.epoch_samples = int(self._first_row[-1])
        """Samples per epoch."""
        if self.epoch_samples == 0:
            raise DataError("the training split has no rows; prepare more text, or rows of a smaller model.context")
        self._seed, self._window = seed, window
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    def sample_ids(self, position: int, count: int) -> np.ndarray:
        """The samples at places position ... position + count - 1 of the run, which counts on over epochs: int64 [count]."""
        return np.concatenate([np.empty(0, np.int64), *(window.ids[part] for window, part in self._pieces(position, count))])

    def window_places(self, position: int, count: int) -> np.ndarray:
        """Where in its window the shard of each of the same samples begins, in [0, 1): float64 [count]."""
        pieces = self._pieces(position, count)
        return np.concatenate([np.empty(0), *(window.starts[window.shard[part]] for window, part in pieces)])

    def shards(self, position: int, count: int, ahead: int, share: Share = WHOLE) -> tuple[list[int], list[int]]:
        """The shards of the windows that `sample_ids(position, count)` reads, and the `ahead` others that come after them; of each
        window those alone that lie in `share` of its rows."""
        needed: dict[int, None] = {}
        following: dict[int, None] = {}
        end, horizon = position + count, position + count + 2 * self.epoch_samples  # until then every shard has come
        while position < end or (position < horizon and len(following) < ahead):
            epoch_number, _, window = self._locate(position)
            epoch, shards = self._epoch(epoch_number), self._shards_of(epoch_number, window)
            starts, ends = self._fractions(shards)
            here = shards[(starts < share[1]) & (ends > share[0])].tolist()
            if position < end:
                needed.update(dict.fromkeys(here))
            else:
                following.update(dict.fromkeys(shard for shard in here if shard not in needed))
            position = epoch_number * self.epoch_samples + int(epoch.starts[window + 1])
        return list(needed), list(following)[:ahead]

    def shards_at_once(self, count: int) -> int:
        """The most shards that `shards` ever says any `count` places in a row need."""
        whole = int(np.searchsorted(np.cumsum(np.sort(self._rows)), count, side="right"))  # so many can lie between two windows
        return min(len(self._rows), 2 * self._window + whole)

    def _epoch(self, number: int) -> _Epoch:
        if (known := self._epochs.get(number)) is not None:
            return known
        shards = _permutation(self._seed, "shard order", len(self._rows), number)
        starts = np.concatenate([[0], np.cumsum(np.add.reduceat(self._rows[shards], np.arange(0, len(shards), self._window)))])
        return _keep_two(self._epochs, number, _Epoch(shards, starts))

    def _pieces(self, position: int, count: int) -> list[tuple[_Window, slice]]:
        """The samples from `position` on as parts of windows."""
        pieces = []
        while count > 0:
            epoch_number, place, window = self._locate(position)
            first, end = self._epoch(epoch_number).starts[window : window + 2].tolist()
            start, length = place - first, min(count, end - place)
            pieces.append((self._window_of(epoch_number, window), slice(start, start + length)))
            position, count = position + length, count - length
        return pieces

    def _locate(self, position: int) -> tuple[int, int, int]:
        """The epoch of a place of the run, its place in that, and its window there."""
        epoch, place = divmod(position, self.epoch_samples)
        return epoch, place, int(np.searchsorted(self._epoch(epoch).starts, place, side="right")) - 1

    def _shards_of(self, epoch: int, window: int) -> np.ndarray:
        return self._epoch(epoch).shards[window * self._window : (window + 1) * self._window]

    def _fractions(self, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each of a window's shards begins and ends, as fractions of the window's rows."""
        ends = np.cumsum(self._rows[shards])
        total = max(1, int(ends[-1]))
        return (ends - self._rows[shards]) / total, ends / total

    def _window_of(self, epoch: int, window: int) -> _Window:
        if (known := self._windows.get((epoch, window))) is not None:
            return known
        shards = self._shards_of(epoch, window)
        ids = np.concatenate([np.arange(self._first_row[shard], self._first_row[shard + 1]) for shard in shards])
        order = _permutation(self._seed, "row order", len(ids), epoch, window)
        shard = np.repeat(np.arange(len(shards), dtype=np.int32), self._rows[shards])
        return _keep_two(self._windows, (epoch, window), _Window(ids[order], shard[order], self._fractions(shards)[0]))


class SkippingOrder:
    """`order` without some ranges of its places: sample n of the run stands at `place_of(n, ranges)`."""

    def __init__(self, order: Order, ranges: Sequence[Sequence[int]]) -> None:
        """`ranges`: [from, to), ascending and apart."""
        self._order, self._ranges = order, ranges

    def sample_ids(self, position: int, count: int) -> np.ndarray:
        """As GlobalOrder.sample_ids."""
        pieces = [self._order.sample_ids(place, length) for place, length in self._pieces(position, count)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def window_places(self, position: int, count: int) -> np.ndarray:
        """As GlobalOrder.window_places."""
        return np.concatenate([np.empty(0), *(self._order.window_places(place, length) for place, length in self._pieces(position, count))])

    def shards(self, position: int, count: int, ahead: int, share: Share = WHOLE) -> tuple[list[int], list[int]]:
        """As GlobalOrder.shards."""
        found = [self._order.shards(place, length, ahead, share) for place, length in self._pieces(position, count)]
        needed = list(dict.fromkeys(shard for some, _ in found for shard in some))
        return needed, [shard for shard in found[-1][1] if shard not in needed] if found else []

    def _pieces(self, position: int, count: int) -> list[tuple[int, int]]:
        """The samples as runs of places that follow each other: (first, length)."""
        pieces = []
        while count > 0:
            place = place_of(position, self._ranges)
            border = min((first for first, _ in self._ranges if first > place), default=place + count)
            length = min(count, border - place)
            pieces.append((place, length))
            position, count = position + length, count - length
        return pieces


def place_of(sample: int, ranges: Sequence[Sequence[int]]) -> int:
    """The place of a sample in the order that has the ranges [from, to), ascending, still in it."""
    for first, stop in ranges:
        if sample < first:
            break
        sample += stop - first
    return sample


def _permutation(seed: int, purpose: str, count: int, *indices: int) -> np.ndarray:
    """A permutation of 0 ... count-1, a function of the other arguments: int64 [count]."""
    return np.argsort(generator(seed, purpose, *indices).bit_generator.random_raw(count), kind="stable")


def _keep_two(kept: OrderedDict[Any, _Kept], key: Any, value: _Kept) -> _Kept:
    """The neighbouring epoch or window stays at hand: a global batch may lie across a border. Returns `value`, whatever stays."""
    kept[key] = value
    if len(kept) > 2:
        kept.popitem(last=False)
    return value
