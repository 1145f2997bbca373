"""Whole documents together in rows: each into the row with the least room that still holds it, the longest first.

That is best-fit decreasing (Ding et al. 2024, "Fewer truncations improve language modeling", arXiv 2404.10830). Only a document that is
longer than a row is cut, into full rows and a rest, which is placed as a document of its length. It is done window after window, of as many
tokens as WINDOW rows hold, so that memory and the distance of what shares a row are bounded, however long the corpus is.

Invariants: the result is a function of the lengths alone; every token is in exactly one row; rows, and the pieces in each, follow each
other as the first documents in them do, so that the first rows of a split are no special choice of it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np

WINDOW = 4096


def best_fit(lengths: np.ndarray, payload: int) -> np.ndarray:
    """Rows of `payload` tokens for documents of these `lengths`, int64 [n], at least 1 each -> int64 [pieces, 4], in the order of the rows:
    row, document, and the tokens of it that the piece holds, from first to before last."""
    parts = -(-lengths // payload)
    document = np.repeat(np.arange(len(lengths)), parts)
    first = (np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)) * payload
    last = np.minimum(first + payload, lengths[document])
    sizes = last - first
    window = (np.cumsum(sizes) - sizes) // (WINDOW * payload)
    borders = [0, *(np.flatnonzero(np.diff(window)) + 1).tolist(), len(sizes)]
    row, rows = np.zeros(len(sizes), np.int64), 0
    for begin, end in pairwise(borders):
        here = _rows(sizes[begin:end], payload)
        row[begin:end] = rows + here
        rows += int(here.max(initial=-1)) + 1
    order = np.argsort(row, kind="stable")
    return np.stack([row, document, first, last], axis=1)[order]


def _rows(sizes: np.ndarray, payload: int) -> np.ndarray:
    """The row of every piece of a window, int64 [n], numbered by the first piece of each."""
    row = np.empty(len(sizes), np.int64)
    open_rows: list[tuple[int, int]] = []  # (room, row), ascending
    count = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        place = bisect_left(open_rows, (size, -1))
        room, chosen = open_rows.pop(place) if place < len(open_rows) else (payload, count)
        count += chosen == count
        row[piece] = chosen
        if room > size:
            insort(open_rows, (room - size, chosen))
    _, firsts = np.unique(row, return_index=True)  # of each row its first piece
    numbers = np.empty(count, np.int64)
    numbers[np.argsort(firsts, kind="stable")] = np.arange(count)
    return numbers[row]
