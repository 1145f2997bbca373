"""Text of a small invented language, the same on every machine and at every commit, packed to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def prepare_invented(folder: Path, context: int) -> Path:
    """Make `folder` a data folder of bytes in rows of `context`."""
    from bd3_scale.data.preparation.packing import Document
    from bd3_scale.data.preparation.prepare import Packing, prepare
    from bd3_scale.data.tokenizer import load_tokenizer

    random, tokenizer = np.random.Generator(np.random.Philox(1)), load_tokenizer("bytes")
    words = ["".join(random.choice(list("aeiounstrlmk"), length)) for length in random.integers(2, 8, 300)]
    usual = 1 / np.arange(1, 301)  # Zipf's law
    documents = []
    for number in range(500):
        chosen = random.choice(words, 100, p=usual / usual.sum())
        sentences = (" ".join(chosen[first : first + 10]) for first in range(0, 100, 10))
        documents.append(Document(f"{number}", np.array(tokenizer.encode(". ".join(sentences))), held_out=number % 5 == 0))
    prepare(folder, Packing(tokenizer, context, shard_bytes=8192), "tests", None, lambda: documents)
    return folder
