"""Documents from a file of the user's: JSON lines, or plain text with an empty line after each document.

Read as a stream, in constant memory. Invariants: a document is held out by a hash of its text, so exact copies of it are on the same
side; a line that is not what it should be is an error that names it, never a document less.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bd3_scale.data.packing import HELD_OUT, Document, held_out
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.errors import DataError

_BATCH = 256
"""Documents tokenized at a time."""


def file_documents(
    path: Path,
    tokenizer: Tokenizer,
    *,
    budget: int | None = None,
    validation: float = HELD_OUT,
    text_key: str = "text",
    progress: bool = True,
) -> Iterator[Document]:
    """The documents of a .jsonl file (the string under `text_key` of each line) or a .txt file, at most `budget` tokens in all.

    `validation` is the share held out. Raises DataError.
    """
    total = 0
    try:
        with (
            path.open("rb") as file,
            tqdm(
                total=path.stat().st_size, unit="B", unit_scale=True, desc=f"reading {path.name}", disable=None if progress else True
            ) as bar,
        ):
            lines = _decoded(file, path, bar)
            if path.suffix == ".jsonl":
                texts = _json_texts(lines, path, text_key)
            elif path.suffix == ".txt":
                texts = _plain_texts(lines)
            else:
                raise DataError(f"{path}: its kind is not known; give a .jsonl or a .txt file")
            while batch := list(islice(texts, _BATCH)):
                for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                    total += len(ids) + 1
                    if budget is not None and total > budget:
                        return
                    yield Document(path.name, np.array(ids, np.uint32), held_out(text, validation))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the path of a .jsonl or .txt file") from None


def _decoded(file: Iterator[bytes], path: Path, bar: tqdm) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        bar.update(len(line))
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path}: line {number} is not UTF-8; convert the file") from None


def _json_texts(lines: Iterator[str], path: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)[key]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise DataError(f'{path}: line {number} is not an object with a string under "{key}"; mend the line or give --text-key')
        yield text


def _plain_texts(lines: Iterator[str]) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if line.strip():
            document.append(line)
        elif document:
            yield "".join(document).rstrip("\r\n")
            document = []
    if document:
        yield "".join(document).rstrip("\r\n")
