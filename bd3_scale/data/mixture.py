"""Several data sets read as one: which of them each sample of the run comes from, and the readers and orders behind that.

Weights are exact decimals that sum up to 1, so the schedule repeats after a whole number of samples, in which every source gives its
exact share; inside that period the sources follow each other by Tijdeman's rule ("The chairman assignment problem", Discrete
Mathematics 32, 1980). Invariants: after any n samples source k has given n * weight_k of them, less than one off; a sample's source
and its place in that source are a function of the weights and its number alone, in O(1), so that the samples consumed stay the whole
state of the data; each source is read in the order that it would have alone, epoch by epoch, at its own pace.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from bd3_scale.data.loader import Rows, TrainingRows
from bd3_scale.data.order import WHOLE, GlobalOrder, Share
from bd3_scale.errors import DataError
from bd3_scale.recipe.mixture_weights import exact_weight, weights_problem


class Mixture:
    """The source of every sample, from `weights` (see `weights_problem`; ValueError where there is one)."""

    def __init__(self, weights: Sequence[float]) -> None:
        if (problem := weights_problem(weights)) is not None:
            raise ValueError(problem)
        exact = [exact_weight(weight) for weight in weights]
        self.period = lcm(*(weight.denominator for weight in exact))
        self.shares = np.array([int(weight * self.period) for weight in exact], np.int64)
        """Samples that each source gives in a period."""
        self._source = _chairmen(self.shares.tolist(), self.period)
        """The source of each place of a period."""
        given = np.cumsum(self._source[:, None] == np.arange(len(exact)), axis=0)
        self._before = np.concatenate([np.zeros((1, len(exact)), np.int64), given])
        """[period + 1, sources]: samples that each source gave before a place."""

    def counts(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples each source gives: int64 [sources]."""
        periods, place = divmod(samples, self.period)
        return periods * self.shares + self._before[place]

    def at(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of `samples` (numbers, int64 [n]) and its number in that source: two int64 [n]."""
        periods, places = np.divmod(samples, self.period)
        sources = self._source[places]
        return sources, periods * self.shares[sources] + self._before[places, sources]

    def first_shortage(self, available: Sequence[int]) -> int:
        """The number of samples that can be given before some source has given all it has (`available` of each)."""
        limits = []
        for source, (share, rows) in enumerate(zip(self.shares.tolist(), available, strict=True)):
            periods, rest = divmod(rows, share)
            limits.append(periods * self.period + int(np.flatnonzero(self._source == source)[rest]))
        return min(limits)


def _chairmen(shares: Sequence[int], period: int) -> np.ndarray:
    """Tijdeman's schedule of a period: int64 [period]. Deviations from the ideal stay within 1 - 1 / (2 K - 2)."""
    slack = 2 * len(shares) - 2
    given = [0] * len(shares)
    schedule = np.zeros(period, np.int64)
    for place in range(period if slack else 0):
        owed = [(place + 1) * share - period * count for share, count in zip(shares, given, strict=True)]  # times period
        ready = [source for source, debt in enumerate(owed) if slack * debt >= period]
        chosen = min(ready, key=lambda source: Fraction(slack * (period - owed[source]) - period, shares[source]))
        schedule[place] = chosen
        given[chosen] += 1
    return schedule


class MixedOrder:
    """The order of a mixture: rows and shards of all sources are numbered through, in the order of the sources."""

    def __init__(self, mixture: Mixture, orders: Sequence[GlobalOrder], shards: Sequence[int]) -> None:
        """`shards`: how many each source has."""
        self._mixture, self._orders = mixture, orders
        self._first_row = np.cumsum([0, *(order.epoch_samples for order in orders)])
        self._first_shard = np.cumsum([0, *shards])

    def sample_ids(self, position: int, count: int) -> np.ndarray:
        """As GlobalOrder.sample_ids."""
        sources, _ = self._mixture.at(np.arange(position, position + count))
        ids = np.empty(count, np.int64)
        for source, (order, first) in enumerate(zip(self._orders, self._mixture.counts(position), strict=True)):
            chosen = np.flatnonzero(sources == source)  # in each source, samples that follow each other
            ids[chosen] = self._first_row[source] + order.sample_ids(int(first), len(chosen))
        return ids

    def window_places(self, position: int, count: int) -> np.ndarray:
        """As GlobalOrder.window_places, in the windows of the sources."""
        sources, _ = self._mixture.at(np.arange(position, position + count))
        places = np.empty(count)
        for source, (order, first) in enumerate(zip(self._orders, self._mixture.counts(position), strict=True)):
            chosen = np.flatnonzero(sources == source)
            places[chosen] = order.window_places(int(first), len(chosen))
        return places

    def shards(self, position: int, count: int, ahead: int, share: Share = WHOLE) -> tuple[list[int], list[int]]:
        """As GlobalOrder.shards; the `ahead` of each source."""
        needed: list[int] = []
        following: list[int] = []
        spans = zip(self._mixture.counts(position).tolist(), self._mixture.counts(position + count).tolist(), strict=True)
        for order, offset, (first, last) in zip(self._orders, self._first_shard.tolist(), spans, strict=False):
            own_needed, own_following = order.shards(first, max(1, last - first), ahead, share)
            needed += [offset + shard for shard in own_needed]
            following += [offset + shard for shard in own_following]
        return needed, following


class MixedRows:
    """The training rows of several readers, numbered through."""

    def __init__(self, readers: Sequence[TrainingRows], shards: Sequence[int]) -> None:
        """`shards`: how many each reader has."""
        self._readers = readers
        self._first_row = np.cumsum([0, *(len(reader) for reader in readers)])
        self._first_shard = np.cumsum([0, *shards])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def rows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """As ShardReader.rows."""
        numbers = np.asarray(indices, np.int64)
        sources = np.searchsorted(self._first_row, numbers, side="right") - 1
        return _gather([reader.rows for reader in self._readers], sources, numbers - self._first_row[sources])

    def counts(self, indices: np.ndarray) -> np.ndarray:
        """As ShardReader.counts."""
        sources = np.searchsorted(self._first_row, indices, side="right") - 1
        return _gather([reader.counts for reader in self._readers], sources, indices - self._first_row[sources])

    @property
    def fetches(self) -> bool:
        return any(reader.fetches for reader in self._readers)

    def fetch(self, shard: int, keep: Collection[int]) -> bool:
        """As ShardReader.fetch; every source has a cache of its own, and one that is full does not stop the others."""
        source = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        self._readers[source].fetch(shard - int(self._first_shard[source]), self._own(source, keep))
        return True

    def open_ahead(self, shard: int, needed: Collection[int]) -> None:
        """As ShardReader.open_ahead."""
        source = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        self._readers[source].open_ahead(shard - int(self._first_shard[source]), self._own(source, needed))

    def keep_open(self, shards: Collection[int]) -> None:
        for source, reader in enumerate(self._readers):
            reader.keep_open(self._own(source, shards))

    def _own(self, source: int, shards: Collection[int]) -> list[int]:
        first, stop = self._first_shard[source : source + 2].tolist()
        return [shard - first for shard in shards if first <= shard < stop]


class MixedHeldOut:
    """The held-out rows of a mixture: row i is of the source that sample i would be of, until the first source has no more.

    So however many rows a validation takes, its mean is that of the mixture that is trained on.
    """

    def __init__(self, mixture: Mixture, readers: Sequence[Rows]) -> None:
        """Raises DataError where not even one row can be taken."""
        self._mixture, self._readers = mixture, readers
        self._length = mixture.first_shortage([len(reader) for reader in readers])
        if self._length == 0:
            raise DataError("a source of data.mixture has no held-out rows; prepare it again with a larger validation share")

    def __len__(self) -> int:
        return self._length

    def rows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """As ShardReader.rows."""
        numbers = np.asarray(indices, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of the held-out rows of a mixture, which has {len(self)}")
        return _gather([reader.rows for reader in self._readers], *self._mixture.at(numbers))


def _gather(readers: Sequence[Callable[[np.ndarray], np.ndarray]], sources: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """What reader `sources[i]` has for its row `numbers[i]`: [n, ...]."""
    parts = [np.flatnonzero(sources == source) for source in range(len(readers))]
    rows = np.concatenate([read(numbers[part]) for read, part in zip(readers, parts, strict=True)])
    result = np.empty_like(rows)
    result[np.concatenate(parts)] = rows
    return result
