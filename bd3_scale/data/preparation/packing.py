"""Documents -> rows of exactly L tokens.

The end of text follows every document, documents follow one another without a gap, and the stream is cut into rows; what
is left of a document begins the next row. Invariants: concatenating the rows (without their own special tokens) gives the
stream back; only the last, incomplete row is dropped, and its tokens are counted; no row holds MASK.

Row specials (Begin of sequence is the end-of-text id, as in GPT-2 and in the paper's code):
    none     L tokens of the stream (the paper's OpenWebText): texts of the model go on past a row
    bos      [BOS] + L-1 tokens: position 0, which is never masked and never scored, costs no text
    bos_eos  [BOS] + L-2 tokens + [EOS] (the paper's LM1B): every row ends with an end of text, and so do the texts of the model
(the paper: Arriola et al. 2025, bd3lms `_group_texts` with and without its special tokens)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from bd3_scale.data.counted import uncounted
from bd3_scale.errors import RecipeError

ROW_SPECIAL = {"none": 0, "bos": 1, "bos_eos": 2}
"""Kind -> special tokens in each row."""
HELD_OUT = 0.04
"""Share of the documents that is kept for validation."""


def texts_end_at(row_special: str, context: int) -> str | None:
    """What a person should know before training on such rows; None: nothing."""
    if row_special != "bos_eos":
        return None
    return (
        f"data.row_special=bos_eos ends every row with an end of text: texts of this model end at {context:,} tokens (model.context); "
        "prepare the data with none for texts that go on"
    )


@dataclass(frozen=True)
class Document:
    """A tokenized document: its name, its ids (1-D, without end of text) and whether it is held out for validation."""

    name: str
    tokens: np.ndarray
    held_out: bool


def held_out(name: str, fraction: float = HELD_OUT) -> bool:
    """Whether the document called `name` belongs to validation: a function of the name and `fraction` alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8], "big") < fraction * 2.0**64


def storage_dtype(vocabulary_size: int, all_count: bool = True) -> str:
    """The smallest type that holds every id of text: uint16 | uint32, or where not all tokens count int16 | int32 (`counted`)."""
    if not all_count:
        return "int16" if vocabulary_size <= 1 << 15 else "int32"
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


class Packer:
    """Packs a stream of documents; feed `add`, take the complete rows it returns. `dropped_tokens` is what waits for a full row."""

    def __init__(self, context: int, vocabulary_size: int, end_of_text: int, row_special: str, all_count: bool = True) -> None:
        """`all_count`: whether all tokens of the rows count; else they are of a signed type."""
        if row_special not in ROW_SPECIAL:
            raise RecipeError(f"data.row_special must be one of {', '.join(ROW_SPECIAL)}, got {row_special!r}")
        self.payload = context - ROW_SPECIAL[row_special]
        if self.payload < 1:
            raise RecipeError(
                f"model.context {context} leaves no room for text with data.row_special={row_special}; set model.context=3 or more"
            )
        self.context, self.vocabulary_size, self.end_of_text, self.row_special = context, vocabulary_size, end_of_text, row_special
        self.dtype = np.dtype(storage_dtype(vocabulary_size, all_count))
        self.documents = 0
        self.tokens = 0
        """Tokens of the stream so far: documents with their end of text."""
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0

    @property
    def rows(self) -> int:
        """Complete rows so far."""
        return self.tokens // self.payload

    @property
    def dropped_tokens(self) -> int:
        """Tokens that do not fill a row (yet)."""
        return self._pending_tokens

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """Append one document (1-D ids); the rows that it completes, [n, L] of `dtype`. Raises ValueError for ids that are no text."""
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary_size:
            raise ValueError(f"a document has ids {tokens.min()} to {tokens.max()}, the vocabulary has 0 to {self.vocabulary_size - 1}")
        self._pending += [tokens.astype(self.dtype), np.array([self.end_of_text], self.dtype)]
        self._pending_tokens += len(tokens) + 1
        self.documents += 1
        self.tokens += len(tokens) + 1
        count = self._pending_tokens // self.payload
        if count == 0:
            return np.empty((0, self.context), self.dtype)
        stream = np.concatenate(self._pending)
        used = count * self.payload
        self._pending, self._pending_tokens = [stream[used:].copy()], len(stream) - used
        return self.rows_of(stream[:used].reshape(count, self.payload))

    def rows_of(self, payloads: np.ndarray) -> np.ndarray:
        """[n, payload] tokens -> [n, L] with the rows' own specials."""
        rows = np.full((len(payloads), self.context), self.end_of_text, self.dtype)
        start = 0 if self.row_special == "none" else 1
        rows[:, start : start + self.payload] = payloads
        if self.row_special == "bos_eos" and self.dtype.kind == "i":
            rows[:, -1] = np.where(payloads[:, -1] < 0, uncounted(rows[:, -1]), rows[:, -1])  # behind filling it is no end
        return rows
