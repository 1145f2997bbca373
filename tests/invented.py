"""Text of a small invented language, the same on every machine and at every commit, packed to train on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

LETTERS = "aeiounstrlmk"
PROMPT_LETTERS, ANSWER_LETTERS = LETTERS.upper() + "_", LETTERS + " "
"""Of `prepare_filled`: no token of a prompt is one of an answer."""


def prepare_invented(folder: Path, context: int) -> Path:
    """Make `folder` a data folder of bytes in rows of `context`."""
    from bd3_scale.data.preparation.packing import Document
    from bd3_scale.data.preparation.prepare import Packing, prepare
    from bd3_scale.data.tokenizer import load_tokenizer

    tokenizer, texts = load_tokenizer("bytes"), invented_texts(500, 100)
    documents = [Document(f"{number}", np.array(tokenizer.encode(text)), held_out=number % 5 == 0) for number, text in enumerate(texts)]
    prepare(folder, Packing(tokenizer, context, shard_bytes=8192), "tests", None, lambda: documents)
    return folder


def prepare_filled(folder: Path, context: int) -> Path:
    """Make `folder` a data folder of prompts in capitals and answers in small letters, a pair in each row of `context` bytes, filled up."""
    from bd3_scale.data.preparation.prepare import Packing
    from bd3_scale.data.preparation.prepare_corpus import Corpus, prepare_corpus
    from bd3_scale.data.tokenizer import load_tokenizer

    corpus = folder.with_suffix(".jsonl")
    texts = enumerate(invented_texts(600, 10))
    pairs = [(text[: number % 9].upper().replace(" ", "_"), text[number % 9 : 9 + number % 20]) for number, text in texts]
    corpus.write_text("".join(json.dumps({"prompt": one, "response": other}) + "\n" for one, other in pairs))
    packing = Packing(load_tokenizer("bytes"), context, shard_bytes=16384, kind="document", records="prompts")
    prepare_corpus(folder, packing, Corpus((str(corpus),), held_out_last=100), workers=1, progress=False)
    return folder


def invented_texts(count: int, length: int) -> list[str]:
    """Texts of `length` words."""
    random = np.random.Generator(np.random.Philox(1))
    words = ["".join(random.choice(list(LETTERS), size)) for size in random.integers(2, 8, 300)]
    usual = 1 / np.arange(1, 301)  # Zipf's law
    chosen = [random.choice(words, length, p=usual / usual.sum()) for _ in range(count)]
    return [". ".join(" ".join(one[first : first + 10]) for first in range(0, length, 10)) for one in chosen]
