"""The sets of the paper's zero-shot table, from local files: detokenized as there, packed into rows, cached.

The paper (Arriola et al. 2025, table 4) measures a model trained on OpenWebText on the test or validation text of seven
other sets. Four of these are published with words and signs apart ("it 's", "@-@"); as in the paper (and in MDLM and SEDD
before it), rules undo that first. Then all documents of a set follow one another without anything between them, and the
stream is cut into rows of the model's context with the special tokens of its training rows ("wrap", no end of text).

Invariants: nothing is downloaded; the cached rows are those of (set, content of the file, tokenizer, context, row specials,
version of the rules), whatever the file is called; a cache that was cut or changed is made again; no row holds MASK.
One rule of the published code is left out, as it can match no text ("/' [0-9]/", slashes included).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from bd3_scale.data.lock import exclusive
from bd3_scale.data.preparation.corpus import corpus_files
from bd3_scale.data.preparation.packing import Packer
from bd3_scale.data.preparation.records import texts
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.errors import DataError, RecipeError
from bd3_scale.files import expanded

RULES_VERSION = 1
"""Part of the cache's key: raise it with every change of a rule."""
CACHE = Path("~/.cache/bd3_scale/zero-shot")
_BATCH = 256
"""Documents tokenized at a time."""

Rules = Sequence[tuple[str, str]]


def _replaced(text: str, rules: Rules) -> str:
    for old, new in rules:
        text = text.replace(old, new)
    return text


def _substituted(text: str, rules: Rules) -> str:
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text


_WIKITEXT_SIGNS: Rules = (
    ("s '", "s'"),
    *((f" @{sign}@ ", sign) for sign in "-,."),
    *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"),
)
_WIKITEXT_PAIRS: Rules = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_WIKITEXT_REST: Rules = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
_LM1B_WORDS: Rules = (
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
)
_LM1B_PAIRS: Rules = (
    (r"\" ([^\"]+) \"", r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^\(\)]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
)


def wikitext(text: str) -> str:
    """WikiText-103: signs written apart or as @-@, brackets and quotation marks with spaces inside, headings of ` = = `."""
    return _replaced(_substituted(_replaced(text, _WIKITEXT_SIGNS), _WIKITEXT_PAIRS), _WIKITEXT_REST)


def penn_treebank(text: str) -> str:
    """Penn Treebank: contractions, numbers that are written N, unknown words."""
    text = _replaced(text, ((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")))
    # Of neighbours (N N) one pass finds every other one, because they share a space; the published rule makes ten passes.
    for _ in range(10):
        text = text.replace(" N ", " 1 ")
    return _replaced(text, (("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")))


def one_billion_words(text: str) -> str:
    """LM1B: signs and contractions written apart, addresses in pieces."""
    text = _substituted(_replaced(text, (("http : / / ", "http://"), ("https : / / ", "https://"))), _LM1B_WORDS)
    for sign in "?!":
        text = re.sub(rf" \{sign}$", sign, text.replace(f" {sign} ", f"{sign} "))
    text = _replaced(text, ((" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")))
    return _replaced(_substituted(text, _LM1B_PAIRS), (("$ ", "$"), ("£ ", "£")))


def lambada(text: str) -> str:
    """LAMBADA: straight quotation marks; a passage begins a line."""
    return "\n" + _replaced(text, (("“", '"'), ("”", '"'))).strip()


def scientific_paper(text: str) -> str:
    """PubMed and arXiv: the rules of WikiText, then those of LM1B."""
    return one_billion_words(wikitext(text))


@dataclass(frozen=True)
class ZeroShotSet:
    """One set: how its text is mended, where a file of it has its text, and the paper's perplexity of BD3-LM with L' = 4."""

    detokenize: Callable[[str], str] | None
    text_key: str = "text"
    """Field or column of .jsonl, .parquet and .arrow files, as the sets are published on the Hugging Face hub."""
    line_ends: bool = False
    """Whether a line of a .txt file, which is a document, keeps its end (and what else surrounds it)."""
    paper: float | None = None


SETS: dict[str, ZeroShotSet] = {
    "ptb": ZeroShotSet(penn_treebank, "sentence", paper=96.81),
    "wikitext103": ZeroShotSet(wikitext, line_ends=True, paper=31.31),
    "lm1b": ZeroShotSet(one_billion_words, paper=60.88),
    "lambada": ZeroShotSet(lambada, paper=50.03),
    "ag_news": ZeroShotSet(None, paper=61.67),
    "pubmed": ZeroShotSet(scientific_paper, "article", paper=42.52),
    "arxiv": ZeroShotSet(scientific_paper, "article", paper=39.20),
}


@dataclass(frozen=True)
class ArrayRows:
    """Rows held in one array [n, L] (in memory, or mapped from a file)."""

    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    def rows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows `indices`, [n, L] of the stored dtype."""
        return np.asarray(self.array[np.asarray(indices, np.int64)])


def zero_shot_rows(name: str, source: str, tokenizer: Tokenizer, *, context: int, row_special: str, cache: Path = CACHE) -> ArrayRows:
    """The rows of the set `name` from `source`: a file, a folder or a pattern (corpus.py), with .txt a document a line.

    Prepared into `cache` unless they are there. What does not fill a last row is dropped, as in training.
    Raises RecipeError for a set that is not known, DataError for a source that cannot be read or is too small.
    """
    if name not in SETS:
        raise RecipeError(f"zero-shot set {name!r} is not known; name one of {', '.join(SETS)}")
    packer = Packer(context, tokenizer.vocabulary_size, tokenizer.end_of_text, row_special)  # checks what it is given
    files = corpus_files([source])
    definition = [name, RULES_VERSION, tokenizer.fingerprint, context, row_special, [_sha256(path) for path in files]]
    key = hashlib.sha256(json.dumps(definition).encode()).hexdigest()[:16]
    folder = expanded(cache).absolute()
    path = folder / f"{name}-{key}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_suffix(".lock")):
            if not _whole(path):
                _write(path, _packed(_documents(SETS[name], files), tokenizer, packer, source))
    except OSError as error:
        raise DataError(f"{folder}: the cache of zero-shot sets cannot be written ({error.strerror}); give another --cache") from None
    return ArrayRows(np.load(path, mmap_mode="r", allow_pickle=False))


def _documents(chosen: ZeroShotSet, files: Iterable[Path]) -> Iterator[str]:
    for text, _ in texts(files, chosen.text_key, by_line=True):
        if not text.strip():
            continue
        if not chosen.line_ends:
            text = text.rstrip("\r\n") if chosen.detokenize is None else text.strip()
        yield text if chosen.detokenize is None else chosen.detokenize(text)


def _packed(documents: Iterator[str], tokenizer: Tokenizer, packer: Packer, source: str) -> np.ndarray:
    """All documents as rows [n, L], nothing between one and the next."""
    parts = []
    while batch := list(islice(documents, _BATCH)):
        parts += [np.array(ids, packer.dtype) for ids in tokenizer.encode_batch(batch)]
    stream = np.concatenate([np.empty(0, packer.dtype), *parts])
    count = len(stream) // packer.payload
    if count == 0:
        raise DataError(f"{source}: has {len(stream)} tokens, too few for one row of {packer.context}; give the whole set")
    return packer.rows_of(stream[: count * packer.payload].reshape(count, -1))


def _write(path: Path, rows: np.ndarray) -> None:
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
    path.with_suffix(".sha256").write_text(_sha256(new))
    new.replace(path)


def _whole(path: Path) -> bool:
    digest = path.with_suffix(".sha256")
    return path.exists() and digest.exists() and digest.read_text() == _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
