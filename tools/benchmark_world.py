"""What one rank of a large world keeps account of, simulated on one machine: groups, manifest, order, index of a ZeRO-3 checkpoint.

Groups are made on torch's fake backend (no network), which makes every group that rank 0 of the world takes part in, and asks of the
others only their names. The index is that of the recipe's network, every tensor divided over all ranks: what every rank packs, what
the leader makes while the main thread goes on launching, and what every rank reads of it when it continues.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def benchmark_world(options: argparse.Namespace) -> dict[str, Any]:
    """One process for each size, so that memory is that of one size."""
    found: dict[str, Any] = {}
    for ranks in options.ranks:
        command = [sys.executable, "-W", "ignore", __file__, str(options.recipe), str(ranks), str(options.shards)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(ended.stderr[-3000:])
        found[f"{ranks} ranks"] = json.loads(ended.stdout.splitlines()[-1])
    return found


def measure(path: str, ranks: int, shards: int) -> dict[str, Any]:
    # The package is imported before anything is measured, since that takes as long in a world of one.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import bd3_scale.engines.megatron_engine  # noqa: F401
    from bd3_scale import recipe as recipes
    from bd3_scale.checkpoint.fragments import Fragment
    from bd3_scale.checkpoint.index import FileRecord, parse
    from bd3_scale.checkpoint.index_process import make
    from bd3_scale.checkpoint.parts import pack, state_name
    from bd3_scale.checkpoint.reader import check_tiling
    from bd3_scale.checkpoint.region import Region
    from bd3_scale.data.manifest import FileEntry, Manifest, Split
    from bd3_scale.data.order import GlobalOrder
    from bd3_scale.distributed import layout
    from bd3_scale.files import files_needed
    from bd3_scale.model.layers import TensorParallelFactory
    from bd3_scale.model.transformer import Transformer
    from bd3_scale.recipe.optimizers import OPTIMIZERS
    from bd3_scale.recipe.schema import ParallelConfig

    recipe, result = recipes.load(path), dict[str, Any]()
    rows = [4096] * shards
    entries = tuple(FileEntry(f"shard.{number:05d}.mds", 1 << 23, 4096, "0" * 16) for number in range(shards))
    split = Split(shards, sum(rows) * 1024, sum(rows), 0, FileEntry("index.json", 1, 0, "0" * 16), entries)
    manifest = Manifest("mds", 1024, "uint16", "none", "gpt2", "0" * 64, 50257, 50256, "synthetic", None, split, split)
    file = Path(tempfile.mkdtemp()) / "manifest.json"
    file.write_bytes(manifest.to_bytes())
    before, began = _memory(), time.perf_counter()

    def timed(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = action()
        result[f"{name} seconds"] = round(time.perf_counter() - start, 4)
        return value

    def groups() -> None:
        torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        layout.start(ParallelConfig(zero=3), "cpu")

    timed("groups", groups)
    timed("manifest", lambda: Manifest.load(file))
    timed("order", lambda: GlobalOrder(rows, 0, 16).sample_ids(10**8, recipe.batches.largest))
    started = time.perf_counter() - began
    for window in (16, 256):
        for by_shard in (False, True):
            few = shards_read(rows, window, max(recipe.batches.largest, 2 * ranks), ranks, by_shard)
            grouped = ", data.group_by_shard" if by_shard else ""
            result[f"shards of a window of {window} that a replica reads{grouped}"] = round(few, 1)

    with torch.device("meta"):
        network = Transformer(recipe.model, 50258, 50257, TensorParallelFactory(1))
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    value = torch.empty(max(-(-parameter.numel() // ranks) for parameter in network.parameters()))

    def of(rank: int) -> list[Fragment]:
        found = []
        for name, shape in shapes.items():
            for kind in ("weight", *OPTIMIZERS[recipe.training.optimizer].of(name), "ema"):
                whole = Region.whole(shape).numel
                share = -(-whole // ranks)
                region = Region.flat(shape, min(rank * share, whole), min((rank + 1) * share, whole))
                if region.numel:
                    found.append(Fragment(kind, name, region, value[: region.numel]))
        return found

    mine = of(0)
    timed("pack of a rank", lambda: pack(mine))
    packed = {rank: pack(of(rank)) for rank in range(ranks)}
    files = {state_name(rank, ranks): FileRecord(1 << 40, "0" * 64) for rank in range(ranks)} | {"recipe.yaml": FileRecord(1, "0" * 64)}
    result["packed bytes of a rank"] = sum(map(len, packed[0]))

    def made() -> bytes:
        start = time.thread_time()
        text = make(1, 0, {}, {}, files, packed)
        result["index made: processor seconds of its thread"] = round(time.thread_time() - start, 4)
        return text

    alone = _launches(lambda: time.sleep(1.0))
    text: list[bytes] = []
    beside = _launches(lambda: text.append(timed("index made", made)))
    result["launches of the main thread while it is made, of those alone"] = round(beside / alone, 3)
    result["index bytes"] = len(text[0])
    start = time.perf_counter()

    def read() -> Any:
        index = parse(text[0])
        check_tiling(index)
        return index

    index = timed("index read and checked", read)
    timed("parts found of a rank", lambda: [index.tensors[one.kind][one.name].parts.meeting(one.region) for one in mine])
    started += time.perf_counter() - start
    result["parts"] = sum(len(tensor.parts) for names in index.tensors.values() for tensor in names.values())
    result["start-up seconds of a rank"] = round(started, 3)
    result["memory bytes above the imports, saving included"] = _memory() - before
    result["descriptors open"] = len(os.listdir("/proc/self/fd"))
    result["descriptors needed at most"] = files_needed(ranks)
    return result


def shards_read(rows: list[int], window: int, batch: int, replicas: int, by_shard: bool) -> float:
    """The mean over four replicas of how many shards of the first window they read."""
    import numpy as np

    from bd3_scale.data.loader import Loader
    from bd3_scale.data.order import GlobalOrder

    class Reader:
        fetches = False
        seen: set[int]

        def rows(self, indices: Any) -> Any:
            self.seen |= set((np.asarray(indices) // rows[0]).tolist())
            return np.zeros((len(indices), 1), np.int64)

        def counts(self, indices: Any) -> Any:
            return np.zeros(len(indices), np.int64)

    reader, order, found = Reader(), GlobalOrder(rows, 0, window), []
    for replica in (0, replicas // 3, replicas // 2, replicas - 1):
        reader.seen = set()
        place: dict[str, Any] = {"micro_batch": None, "replica": replica, "replicas": replicas, "by_shard": by_shard}
        with Loader(reader, order, global_batch=batch, prefetch=0, **place) as loader:  # type: ignore[arg-type]
            for position in range(0, window * rows[0] - batch + 1, batch):
                loader.micro_batches(position)
        found.append(len(reader.seen))
    return float(np.mean(found))


def _launches(action: Callable[[], Any]) -> float:
    """Small operations per second that the main thread launches while `action` runs in another; not counted is the time in which it was
    ready and other programs had the processor."""
    thread = threading.Thread(target=action)
    small, count, queued, start = torch.zeros(16), 0, _queued(), time.perf_counter()
    thread.start()
    while thread.is_alive():
        for _ in range(20):
            small.add_(1.0)
        count += 20
    return count / (time.perf_counter() - start - (_queued() - queued))


def _queued() -> float:
    """Seconds that this thread has waited for a processor."""
    place = Path("/proc/thread-self/schedstat")
    return int(place.read_text().split()[1]) / 1e9 if place.exists() else 0.0


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
