"""A global batch is the same whoever reads it: any number of replicas, any micro-batch, any restart, read ahead or not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bd3_scale.data import checked_once
from bd3_scale.data.formats import row_reader
from bd3_scale.data.formats.row_reader import ShardReader
from bd3_scale.data.loader import Loader, validation_rows
from bd3_scale.data.manifest import Manifest
from bd3_scale.data.order import GlobalOrder
from bd3_scale.data.tokenizer import ByteTokenizer
from bd3_scale.errors import DataError, RecipeError

GLOBAL_BATCH = 24


@pytest.fixture
def reader(prepared: dict[str, tuple[Path, Manifest]]) -> ShardReader:
    return ShardReader(prepared["mds"][0], "train", context=64, tokenizer=ByteTokenizer())


def loader(
    reader: ShardReader,
    micro_batch: int,
    replica: int = 0,
    replicas: int = 1,
    prefetch: int = 2,
    download_ahead: int = 0,
    by_shard: bool = False,
) -> Loader:
    order = GlobalOrder(reader.shard_rows, 1, 2)
    place = {"micro_batch": micro_batch, "replica": replica, "replicas": replicas, "by_shard": by_shard}
    return Loader(reader, order, global_batch=GLOBAL_BATCH, prefetch=prefetch, download_ahead=download_ahead, **place)  # type: ignore[arg-type]


@pytest.mark.parametrize("by_shard", [False, True])
@pytest.mark.parametrize(("micro_batch", "replicas", "prefetch"), [(24, 1, 2), (1, 1, 0), (3, 2, 1), (2, 4, 3), (1, 12, 2)])
def test_replicas_share_the_same_global_batch(reader: ShardReader, micro_batch: int, replicas: int, prefetch: int, by_shard: bool) -> None:
    order = GlobalOrder(reader.shard_rows, 1, 2)
    starts = [step * GLOBAL_BATCH for step in range(len(reader) // GLOBAL_BATCH + 2)]  # over the end of the epoch
    seen = np.full((len(starts), GLOBAL_BATCH), -1)
    for replica in range(replicas):
        with loader(reader, micro_batch, replica, replicas, prefetch, by_shard=by_shard) as opened:
            for step, start in enumerate(starts):
                batches = opened.micro_batches(start)
                ids = order.sample_ids(start, GLOBAL_BATCH).tolist()
                if by_shard:  # the same rows, in the order of the window's shards
                    places = dict(zip(ids, order.window_places(start, GLOBAL_BATCH).tolist(), strict=True))
                    ids = sorted(ids, key=places.__getitem__)
                expected = reader.rows(ids)
                assert len(batches) == GLOBAL_BATCH // (micro_batch * replicas)
                for number, batch in enumerate(batches):
                    first = (replica * len(batches) + number) * micro_batch
                    assert batch.slots.tolist() == list(range(first, first + micro_batch))
                    assert batch.slots.dtype == batch.rows.dtype == np.int64 and (batch.rows == expected[batch.slots]).all()
                    assert (seen[step, batch.slots] == -1).all()
                    seen[step, batch.slots] = replica
    assert (seen >= 0).all()


def test_a_restart_continues_and_a_jump_is_followed(reader: ShardReader) -> None:
    with loader(reader, 4) as first, loader(reader, 4) as second:
        for start in (0, 24, 48, 240, 24, 24):
            here = first.micro_batches(start)
            assert all((a.rows == b.rows).all() for a, b in zip(here, loader(reader, 4, prefetch=0).micro_batches(start), strict=True))
        assert (second.micro_batches(48)[0].rows == first.micro_batches(48)[0].rows).all()


def test_errors_of_the_thread_reach_the_caller_and_it_ends(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("mds")
    reader = ShardReader(folder, "train", context=64, tokenizer=ByteTokenizer())
    for shard in (folder / "train").glob("*.mds"):
        shard.unlink()
    before = threading.active_count()
    with loader(reader, 4) as opened:
        for _ in range(2):
            with pytest.raises(DataError, match="is missing"):
                opened.micro_batches(0)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_reading_is_ahead_of_need(reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    done = threading.Semaphore(0)
    original = Loader._read

    def noted(self: Loader, position: int) -> object:
        try:
            return original(self, position)
        finally:
            read.append(position)
            done.release()

    monkeypatch.setattr(Loader, "_read", noted)
    with loader(reader, 4, prefetch=2) as opened:
        opened.micro_batches(0)
        for _ in range(3):
            assert done.acquire(timeout=30)
        assert read == [0, 24, 48]


@pytest.mark.parametrize(("micro_batch", "replicas"), [(5, 1), (2, 5), (24, 7), (1, 23), (3, 16), (1, 24)])
def test_what_a_share_is_short_of_is_filled_up(reader: ShardReader, micro_batch: int, replicas: int) -> None:
    """Every row of the batch is one replica's; what follows is a row that the replica has, with its slot."""
    expected = reader.rows(GlobalOrder(reader.shard_rows, 1, 2).sample_ids(GLOBAL_BATCH, GLOBAL_BATCH))
    seen: list[int] = []
    shapes = set()
    for replica in range(replicas):
        with loader(reader, micro_batch, replica, replicas) as opened:
            batches = opened.micro_batches(GLOBAL_BATCH)
        own = [slot for batch in batches for slot in batch.slots[: batch.real].tolist()]
        filler = [slot for batch in batches for slot in batch.slots[batch.real :].tolist()]
        assert set(filler) <= set(own)
        assert all((batch.rows == expected[batch.slots]).all() for batch in batches)
        seen += own
        shapes.add(tuple(batch.rows.shape for batch in batches))
    assert sorted(seen) == list(range(GLOBAL_BATCH))
    assert len(shapes) == 1 and len(set(*shapes)) == 1, "all forwards of all replicas have one shape"


def test_a_replica_without_a_row_is_refused(reader: ShardReader) -> None:
    with pytest.raises(RecipeError, match=r"training\.global_batch 24 must be at least the 25 data-parallel replicas"):
        loader(reader, 1, 0, 25)


def test_replicas_read_few_shards_of_a_window_where_rows_are_grouped() -> None:
    """64 replicas, a window of 128 shards, 40 batches: what is opened, and what is opened ahead, is a few shards each and not all."""
    shard_rows, batch, replicas = [400] * 256, 512, 64
    order = GlobalOrder(shard_rows, 0, 128)
    opened: list[set[int]] = []
    ahead: list[set[int]] = []

    class Shards:
        fetches = False

        def rows(self, indices: np.ndarray) -> np.ndarray:
            opened[-1] |= set((indices // 400).tolist())
            return np.zeros((len(indices), 4), np.int64)

        def counts(self, indices: np.ndarray) -> np.ndarray:
            return np.full(len(indices), 3)

        def keep_open(self, shards: list[int]) -> None:
            ahead[-1] |= set(shards)

        def open_ahead(self, shard: int, needed: list[int]) -> None:
            pass

    for replica in range(replicas):
        opened.append(set())
        ahead.append(set())
        place = {"micro_batch": None, "replica": replica, "replicas": replicas, "by_shard": True}
        with Loader(Shards(), order, global_batch=batch, prefetch=0, download_ahead=1, **place) as one:  # type: ignore[arg-type]
            for step in range(40):
                one.micro_batches(step * batch)
    assert max(map(len, opened)) <= 24 and sum(map(len, opened)) / replicas <= 14, "not every shard of the window"
    # The middle replica's share of rows is 1/64, and six deviations of a half over the root of 512 on both sides of it.
    assert max(map(len, ahead)) <= 128 * (1 / 64 + 3 / 512**0.5) + 3
    seen = sum(len(found & known) for found, known in zip(opened, ahead, strict=True))
    assert seen >= 0.99 * sum(map(len, opened)), "what is read was opened ahead"


def test_validation_rows_of_a_replica_follow_each_other(reader: ShardReader) -> None:
    parts = [validation_rows(reader, 11, replica, 3) for replica in range(3)]
    assert [part[0].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]
    assert all((rows == reader.rows(indices)).all() for indices, rows in parts)
    assert len(validation_rows(reader, 10**9, 0, 1)[0]) == len(reader)
    assert validation_rows(reader, 1, 0, 3)[1].shape == (0, 64)


LAYOUTS = [(tensor, pipeline, data) for tensor in (1, 2) for pipeline in (1, 2) for data in (1, 2, 3, 4) if tensor * pipeline * data <= 4]


@pytest.mark.parametrize("kind", ["mds", "webdataset"])
def test_two_epochs_stopped_ten_times_are_two_epochs(kind: str, prepared: dict[str, tuple[Path, Manifest]]) -> None:
    """Each part on another layout of one to four ranks: the same global batches in the same order, every row twice.

    Tensor and pipeline peers read what their replica reads (tests/distributed/test_resumed_data.py has them as processes).
    """
    reader = ShardReader(prepared[kind][0], "train", context=64, tokenizer=ByteTokenizer())
    steps = -(-2 * len(reader) // GLOBAL_BATCH)
    with loader(reader, 1) as whole:
        expected = [np.concatenate([batch.rows for batch in whole.micro_batches(step * GLOBAL_BATCH)]) for step in range(steps)]
    stops = sorted(np.random.default_rng(4).choice(np.arange(1, steps), 10, replace=False).tolist())
    layouts = [LAYOUTS[number % len(LAYOUTS)] for number in np.random.default_rng(5).permutation(11)]
    seen = np.full((steps, GLOBAL_BATCH, 64), -1)
    for first, stop, (tensor, pipeline, data) in zip([0, *stops], [*stops, steps], layouts, strict=True):
        for rank in range(tensor * pipeline * data):
            replica = rank // tensor % data
            micro_batch = GLOBAL_BATCH // data // (2 if pipeline > 1 else 1)
            with loader(reader, micro_batch, replica, data) as opened:
                for step in range(first, stop):
                    for batch in opened.micro_batches(step * GLOBAL_BATCH):
                        before = seen[step, batch.slots]
                        assert ((before == -1) | (before == batch.rows)).all()
                        seen[step, batch.slots] = batch.rows
    assert (seen == np.stack(expected)).all()
    every_row = sorted(map(tuple, np.concatenate([reader.rows(np.arange(len(reader)))] * 2).tolist()))
    assert sorted(map(tuple, seen.reshape(-1, 64)[: len(every_row)].tolist())) == every_row


def test_shards_of_the_next_window_are_opened_ahead(reader: ShardReader) -> None:
    """A window's border would else open all of its shards at once, on all ranks, while all of them wait."""
    order = GlobalOrder(reader.shard_rows, 1, 2)
    needed, following = order.shards(0, 3 * GLOBAL_BATCH, 2)
    with loader(reader, 4, prefetch=2, download_ahead=2) as opened:
        opened.micro_batches(0)
        end = time.monotonic() + 30
        while not set(needed + following) <= reader._open.keys() and time.monotonic() < end:
            time.sleep(0.01)
        assert set(following) <= reader._open.keys()
        for position in range(GLOBAL_BATCH, len(reader), GLOBAL_BATCH):
            opened.micro_batches(position)
            assert len(reader._open) <= reader._open_limit


def test_what_is_needed_is_not_closed_for_what_comes(reader: ShardReader) -> None:
    small = ShardReader(reader._folder.parent, "train", context=64, tokenizer=ByteTokenizer(), open_shards=2)
    small.open_ahead(0, [0, 1, 2])
    small.open_ahead(1, [0, 1, 2])
    small.open_ahead(2, [0, 1, 2])
    assert list(small._open) == [0, 1]
    small.open_ahead(2, [1, 2])
    assert list(small._open) == [1, 2], "the first is read, and goes"
    small.close()


@pytest.mark.parametrize("kind", ["mds", "webdataset"])
def test_a_node_hashes_a_shard_once(kind: str, copy_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight processes of a node read the same rows of the same shards: one of them hashes a file, until it changes."""
    folder, hashed = copy_of(kind), list[int]()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(checked_once, "_folder", lambda: tmp_path)
    plain = row_reader.xxh64

    def counted(content: bytes) -> str:
        hashed.append(len(content))
        return plain(content)

    monkeypatch.setattr(row_reader, "xxh64", counted)

    def rows() -> np.ndarray:
        with ShardReader(folder, "train", context=64, tokenizer=ByteTokenizer()) as one:
            hashed.clear()
            return one.rows(np.arange(len(one)))

    first = rows()
    assert len(hashed) == len(list((folder / "train").glob("*.mds")) or list((folder / "train").glob("*.tar")))
    assert (rows() == first).all() and not hashed
    file = sorted(path for path in (folder / "train").iterdir() if path.suffix in (".mds", ".tar"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    status = file.stat()
    file.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        rows()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as where a disk fails: only the bytes differ
    with pytest.raises(DataError, match="is damaged"):
        rows()
