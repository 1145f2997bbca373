"""Measure the loader against what one H100 needs: python tools/benchmark_loader.py --folder /tmp/loader

For each format it makes one real shard of rows of 1024 random GPT-2 ids and links it under as many names as an epoch of more than
`--samples` rows has shards: a data set of hundreds of GB to every reader, with its manifest, index, hashes and order, that takes 20 MB.
Then, as one data-parallel rank of `--replicas`,
- *resume*: opening the data and giving the first batch after `--samples` samples (the modules are imported before);
- *work*: seconds of the loader for a whole window of shards without reading ahead, opening and checking its shards included;
- *wait*: seconds that steps of the length of an H100's wait for the loader that reads ahead, over the border of two windows.
The step is that of `--tokens-per-second` data tokens a second and GPU. Writes benchmarks/DATE-loader.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from benchmark import machine, write_report

from bd3_scale.batches import Shares
from bd3_scale.data.formats.mds import rows_per_shard, xxh64
from bd3_scale.data.loader import Loader
from bd3_scale.data.manifest import FORMATS, MANIFEST, FileEntry, Manifest
from bd3_scale.data.open import Data, open_data
from bd3_scale.data.preparation.packing import Document
from bd3_scale.data.preparation.prepare import SHARD_BYTES, Packing, prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.program import run_program
from bd3_scale.recipe.schema import DataConfig

SEED = 1


def make(folder: Path, kind: str, context: int, samples: int, shard_bytes: int) -> Manifest:
    """A data folder of one shard under many names."""
    tokenizer, rows = load_tokenizer("gpt2"), rows_per_shard(2 * context, shard_bytes)

    def documents() -> Iterator[Document]:
        random = np.random.default_rng(0)
        for held_out, count in ((False, rows), (True, 8)):
            yield Document("held out" if held_out else "train", random.integers(0, 50256, count * context - 1), held_out)

    manifest = prepare(folder, Packing(tokenizer, context, "none", kind, shard_bytes), "random", None, documents)
    (shard,) = manifest.train.shards
    count = samples // rows + 2 * 16
    original = folder / "train" / shard.file
    names = [original.name.replace("00000", f"{number:05d}", 1) for number in range(count)]
    for name in names[1:]:
        os.link(original, folder / "train" / name)
    index = folder / "train" / "index.json"
    described = index.read_text()
    start, stop = described.index("[") + 1, described.rindex("]")
    head, entry, tail = described[:start], described[start:stop], described[stop:]
    index.write_text(head + ",".join(entry.replace(shard.file, name) for name in names) + tail)
    content = index.read_bytes()
    train = replace(
        manifest.train,
        rows=count * rows,
        tokens=count * rows * context,
        index=FileEntry(index.name, len(content), 0, xxh64(content)),
        shards=tuple(replace(shard, file=name) for name in names),
    )
    manifest = replace(manifest, train=train)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def measure(folder: Path, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    manifest = make(folder, kind, options.context, options.samples, options.shard_bytes)
    share = Shares(options.global_batch, options.replicas).share
    step_seconds = share * options.context / options.tokens_per_second
    start = options.samples // options.global_batch * options.global_batch

    def opened(prefetch: int) -> Data:
        config = DataConfig(path=str(folder), format=kind, row_special="none", prefetch=prefetch)
        return open_data(config, options.context, leader=True, barrier=lambda: None)

    def loader(data: Data) -> Loader:
        return data.loader(SEED, global_batch=options.global_batch, micro_batch=None, replica=0, replicas=options.replicas)

    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    with opened(2) as data, loader(data) as loading:
        loading.micro_batches(start)
        resumed = time.perf_counter() - began
        memory = psutil.Process().memory_info().rss - before
    window_steps = 16 * manifest.train.shards[0].rows // options.global_batch
    with opened(0) as data, loader(data) as loading:
        first = _after_a_border(data, start)
        began, busy = time.perf_counter(), time.process_time()
        for step in range(window_steps):
            loading.micro_batches(first + step * options.global_batch)
        work, busy = time.perf_counter() - began, time.process_time() - busy
    waits = []
    with opened(2) as data, loader(data) as loading:
        border = _after_a_border(data, first + options.global_batch)
        first = border - options.global_batch * (options.steps // 2)
        for step in range(options.steps):
            began = time.perf_counter()
            loading.micro_batches(first + step * options.global_batch)
            waits.append(time.perf_counter() - began)
            time.sleep(step_seconds)
    return {
        "resume_seconds": resumed,
        "memory_bytes_after_resume": memory,
        "samples_per_second": window_steps * share / work,
        "work_share_of_a_step": work / window_steps / step_seconds,
        "processor_share_of_a_step": busy / window_steps / step_seconds,
        "wait_share_of_a_step": sum(waits[1:]) / (len(waits) - 1) / step_seconds,
        "longest_wait_seconds": max(waits[1:]),
        "shards": len(manifest.train.shards),
        "samples_per_epoch": manifest.train.rows,
    }


def _after_a_border(data: Data, position: int) -> int:
    """The first place from `position` on, in steps of 64, whose batch is wholly in another window."""
    order = data.order(SEED)
    here = set(order.shards(position, 1, 0)[0])
    while set(order.shards(position, 1, 0)[0]) & here:
        position += 64
    return position


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_loader"), help="must not exist; deleted")
    sizes = {"samples": 200_000_000, "context": 1024, "global-batch": 512, "replicas": 64, "tokens-per-second": 25_000, "steps": 60}
    sizes["shard-bytes"] = SHARD_BYTES
    for key, value in sizes.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True)
    try:
        measured = {kind: measure(options.folder / kind, kind, options) for kind in FORMATS}
    finally:
        shutil.rmtree(options.folder)
    needed = options.tokens_per_second / options.context
    result: dict[str, Any] = {name: {kind: values[name] for kind, values in measured.items()} for name in measured[FORMATS[0]]}
    result |= {
        "samples_per_second_that_one_gpu_needs": needed,
        "samples_per_second_over_need": {kind: rate / needed for kind, rate in result["samples_per_second"].items()},
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report = {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "command": " ".join(["python tools/benchmark_loader.py", *(arguments or sys.argv[1:])]),
        "machine": machine(),
        "options": {key: str(value) for key, value in vars(options).items()},
        "result": result,
    }
    for key, value in result.items():
        print(f"{key}: {value}")
    print(f"written: {write_report('loader', options.out, report)}")
    return 0


if __name__ == "__main__":
    run_program(main)
