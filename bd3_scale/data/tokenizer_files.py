"""Our tokenizers as the files that AutoTokenizer reads: tokenizer.json and tokenizer_config.json, MASK added by the latter.

A `tokenizers` file is kept as it is, so that its fingerprint stays. Where its ids have holes other readers would give MASK another id:
there MASK is put into the vocabulary of tokenizer.json, and the file as it was stands beside it. GPT-2 and bytes are both byte-pair
encodings over byte characters, the second without a merge. Invariant: the same ids for every text (special tokens written in a text
apart), and MASK has the model's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bd3_scale.data import tokenizer as ours
from bd3_scale.data.chat import ChatTemplate
from bd3_scale.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from bd3_scale.errors import CheckpointError
from bd3_scale.files import expanded

MASK = "<|mask|>"
UNCHANGED = "tokenizer.text.json"
"""The tokenizer without MASK, where tokenizer.json had to change."""


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """The two files in `folder`."""
    path, mask = folder / "tokenizer.json", MASK
    if tokenizer.name in ("gpt2", "bytes"):
        _byte_level(tokenizer.name).save(str(path))
    else:
        shutil.copyfile(expanded(tokenizer.name), path)
        mask = _with_mask(path, tokenizer.mask_id)
    end_of_text = tokenizer.token(tokenizer.end_of_text)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "mask_token": mask,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(tokenizer.mask_id): _added(mask), str(tokenizer.end_of_text): _added(end_of_text)},
    }
    if (chat := ChatTemplate(tokenizer)).source is not None:
        config = {**chat.names, **config, "chat_template": chat.source}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def keep_what_is_told(tokenizer: Tokenizer, folder: Path) -> None:
    """What a copy in `folder` needs beside it to have the same end of text and the same chat template."""
    chat = ChatTemplate(tokenizer)
    config = {} if chat.source is None else {**chat.names, "chat_template": chat.source}
    if config or load_tokenizer(str(folder / "tokenizer.json")).fingerprint != tokenizer.fingerprint:
        config["eos_token"] = tokenizer.token(tokenizer.end_of_text)
        (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n", "utf-8")


def _with_mask(path: Path, mask_id: int) -> str:
    """The name of MASK for the tokenizer at `path`, which is rewritten where a reader would number it otherwise than `mask_id`."""
    import tokenizers

    known = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    mask = next(name for name in (MASK, *(f"<|mask_{number}|>" for number in range(len(known) + 1))) if name not in known)
    if len(known) == mask_id:
        return mask
    document = json.loads(path.read_text("utf-8"))
    vocabulary = document["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        raise CheckpointError(f"{path.name}: its ids have holes, and a model of type {document['model'].get('type')} cannot name MASK's id")
    path.rename(path.with_name(UNCHANGED))
    vocabulary[mask] = mask_id
    document["added_tokens"] = [*document.get("added_tokens", []), {"id": mask_id, **_added(mask)}]
    path.write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    return mask


def _added(content: str) -> dict[str, Any]:
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


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
