"""First half of preparing a corpus: its documents as token ids, in numbered chunk files that several processes make.

A chunk is the next documents of the corpus with about CHUNK_BYTES of text, so it is a function of the corpus alone; its file (.npz without
pickles, every array with a CRC) holds the ids of its documents, each followed by the end of text, where each ends, and which are held out.
A document that is longer than a chunk is cut between words, so that it takes no more memory and time than others do; only its last part has
the end of text.
Invariants: a chunk file appears under its name only when it is complete; one that is there and good is not made again, one that is damaged
is; the number of processes changes nothing but the time.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bd3_scale.data.preparation.packing import held_out, storage_dtype
from bd3_scale.data.preparation.workers import in_order
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer, pieces_of
from bd3_scale.errors import DataError

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Text:
    """A document before it is tokenized. `held_out`: True | False, or None where a hash of the text decides."""

    text: str
    held_out: bool | None
    place: int
    """Bytes of the corpus up to here."""
    counted: bool = True
    """Whether a budget of tokens counts it; not those of files that are held out."""
    last: bool = True
    """False: another part of the document follows."""
    prompt: str | None = None
    """What stands before it and does not count; None: it is no answer."""
    chat: bool = False
    """Whether special tokens written in prompt and text are those tokens, as a chat template writes them."""


@dataclass(frozen=True)
class Chunk:
    """The file of a chunk, opened."""

    tokens: np.ndarray
    """Ids of all its documents, each with its end of text, those of prompts as tokens that do not count (`counted`)."""
    ends: np.ndarray
    """int64 [documents]: where each ends in `tokens`, behind its end of text."""
    held_out: np.ndarray
    """bool [documents]."""
    last: np.ndarray
    """bool [documents]: whether its end is that of the document."""


@dataclass(frozen=True)
class ChunkJob:
    """A chunk to be made. `share`: of the documents whose text decides, those held out."""

    path: Path
    texts: list[Text]
    share: float


@dataclass(frozen=True)
class Made:
    """A chunk that is on the disk. `place`: bytes of the corpus up to its end; `counted`: its tokens but those of held-out files."""

    place: int
    tokens: int
    counted: int


def chunk_path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:06d}.npz"


def read_chunk(path: Path) -> Chunk | None:
    """None where the file is missing or not whole."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return Chunk(content["tokens"], content["ends"], content["held_out"], content["last"])
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def read_ends(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ends, held_out, last) of a chunk without its tokens. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return content["ends"], content["held_out"], content["last"]
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise DataError(f"{path}: is damaged; give the same command again, which makes it anew") from None


def tokenize(
    folder: Path,
    corpus: Iterable[Text],
    tokenizer: str,
    *,
    share: float,
    workers: int,
    budget: int | None,
    total_bytes: int,
    progress: bool,
) -> tuple[int, bool]:
    """Make the chunk files of `corpus` in `folder`; how many of them matter, and whether they are all of the corpus. What an earlier
    process finished is kept.

    `share`: of the documents whose text decides, those held out. `budget`: tokens, but those of held-out files, after which no further
    chunk is needed. Raises DataError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".*.new"):  # of a process that was killed; the lock is ours
        unfinished.unlink()
    jobs = (ChunkJob(chunk_path(folder, number), chunk, share) for number, chunk in enumerate(_chunks(corpus)))
    count = tokens = counted = 0
    with (
        tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None if progress else True) as bar,
        closing(in_order(make_chunk, jobs, workers, _load, tokenizer)) as results,
    ):
        for made in results:
            count, tokens, counted = count + 1, tokens + made.tokens, counted + made.counted
            bar.update(made.place - bar.n)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s")
            if budget is not None and counted >= budget:
                return count, False
    return count, True


def in_parts(text: Text, share: float) -> Iterator[Text]:
    """A document that is longer than a chunk in parts of about that length, as each other one."""
    if len(text.text) <= CHUNK_BYTES:
        yield text
        return
    flag = held_out(text.text, share) if text.held_out is None else text.held_out
    parts = iter(pieces_of(text.text, CHUNK_BYTES))
    part = next(parts)
    for following in parts:
        yield replace(text, text=part, held_out=flag, last=False)
        part = following
    yield replace(text, text=part, held_out=flag)


def _chunks(corpus: Iterable[Text]) -> Iterator[list[Text]]:
    chunk: list[Text] = []
    size = 0
    for text in corpus:
        chunk.append(text)
        size += len(text.text) + len(text.prompt or "") + 16
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_tokenizer: Tokenizer | None = None
"""Of this process."""


def _load(name: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(name)


def make_chunk(job: ChunkJob) -> Made:
    """Tokenize a chunk and write its file, unless it is there and whole."""
    found = read_chunk(job.path)
    ends = found.ends if found is not None and len(found.ends) == len(job.texts) else _write(job.path, job.texts, job.share)
    lengths = np.diff(ends, prepend=0)
    counted = np.array([one.counted for one in job.texts])
    return Made(job.texts[-1].place, int(ends[-1]), int(lengths[counted].sum()))


def _write(path: Path, texts: list[Text], share: float) -> np.ndarray:
    """Where the documents of the new file end."""
    assert _tokenizer is not None
    dtype = np.dtype(storage_dtype(_tokenizer.vocabulary_size, all(one.prompt is None for one in texts)))
    encode = _tokenizer.encode_chat if texts[0].chat else _tokenizer.encode_batch
    encoded, prompts = encode([one.text for one in texts]), encode([one.prompt or "" for one in texts])
    documents = [
        np.array([*(~token for token in prompt), *ids, *[_tokenizer.end_of_text] * one.last], dtype)
        for one, ids, prompt in zip(texts, encoded, prompts, strict=True)
    ]
    ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
    flags = np.array([held_out(one.text, share) if one.held_out is None else one.held_out for one in texts], bool)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with open(new, "wb") as file:
        np.savez(file, tokens=np.concatenate(documents), ends=ends, held_out=flags, last=np.array([one.last for one in texts]))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    return ends
