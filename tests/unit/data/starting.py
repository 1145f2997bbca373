"""A process that opens data folders as told, for test_leftovers.py.

Each line of its input is a JSON object of data.* keys, and `slow`: true to hang in a download after half a file. It opens the data
as the leader of a job, reads every row, and answers with their hash; it ends with its input.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np

from bd3_scale.data.formats.streaming_compat import import_streaming
from bd3_scale.data.open import open_data
from bd3_scale.data.preparation.packing import Document
from bd3_scale.data.preparation.prepare import Packing, prepare
from bd3_scale.data.tokenizer import ByteTokenizer
from bd3_scale.recipe.schema import DataConfig

CONTEXT = 64


def documents() -> list[Document]:
    """The same in every process."""
    generator = np.random.default_rng(0)
    return [Document(f"d{number}", generator.integers(0, 256, 100), number % 5 == 0) for number in range(100)]


def hang_in_downloads() -> None:
    downloader = import_streaming("streaming.base.storage.download").LocalDownloader

    def half(self: object, source: str, target: str, *rest: object) -> None:
        if not source.endswith(".json"):
            Path(target + ".tmp").write_bytes(Path(source).read_bytes()[: Path(source).stat().st_size // 2])
            print("hanging", flush=True)
            time.sleep(600)
        Path(target).write_bytes(Path(source).read_bytes())

    downloader._download_file_impl = half


def main() -> None:
    import_streaming("streaming.base.format.mds")
    print("ready", flush=True)
    for line in sys.stdin:
        keys = json.loads(line)
        if keys.pop("slow", False):
            hang_in_downloads()
        config = DataConfig(tokenizer="bytes", window=2, **keys)
        if config.remote is None:  # as data.source does: whoever comes first prepares
            prepare(Path(config.path), Packing(ByteTokenizer(), CONTEXT, format=config.format), "numbers", None, documents)
        with open_data(config, CONTEXT, leader=True, barrier=lambda: None) as data:
            with data.loader(1, global_batch=8, micro_batch=8, replica=0, replicas=1) as loader:
                steps = len(data.train) // 8
                seen = [loader.micro_batches(8 * step)[0].rows for step in range(steps)]
            seen.append(data.validation.rows(np.arange(len(data.validation))))
        print(hashlib.sha256(np.concatenate(seen).tobytes()).hexdigest(), flush=True)


if __name__ == "__main__":
    main()
