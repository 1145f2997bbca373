"""Our tokenizers as the files that AutoTokenizer reads: tokenizer.json and tokenizer_config.json, MASK added by the latter.

A `tokenizers` file is copied as it is, so that its fingerprint stays. GPT-2 and bytes are both byte-pair encodings over byte
characters, the second without a merge. Invariant: the same ids for every text (special tokens written in a text apart).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bd3_scale.data import tokenizer as ours
from bd3_scale.data.tokenizer import END_OF_TEXT, Tokenizer

MASK = "<|mask|>"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """The two files in `folder`."""
    path = folder / "tokenizer.json"
    if tokenizer.name in ("gpt2", "bytes"):
        _byte_level(tokenizer.name).save(str(path))
        end_of_text = END_OF_TEXT
    else:
        shutil.copyfile(Path(tokenizer.name).expanduser(), path)
        end_of_text = _special(path, tokenizer.end_of_text)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "mask_token": MASK,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(tokenizer.mask_id): _added(MASK), str(tokenizer.end_of_text): _added(end_of_text)},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def _added(content: str) -> dict[str, Any]:
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _special(path: Path, number: int) -> str:
    document = json.loads(path.read_text("utf-8"))
    return next(token["content"] for token in document["added_tokens"] if token["id"] == number)


def _byte_level(name: str) -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    printable = [value for value in range(256) if chr(value).isprintable() and chr(value) != " "]
    order = printable + [value for value in range(256) if value not in set(printable)]
    letters = [chr(value) for value in printable] + [chr(256 + place) for place in range(256 - len(printable))]
    merges: list[tuple[str, str]] = []
    if name == "gpt2":
        vocabulary = {letter: number for number, letter in enumerate(letters)}
        for line in ours._gpt2_merges().split("\n")[1:-1]:
            first, second = line.split(" ")
            merges.append((first, second))
            vocabulary[first + second] = len(vocabulary)
    else:
        vocabulary = dict(zip(letters, order, strict=True))
    built = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "gpt2")
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return built
