"""Rows of which not every token counts: filling behind a document, a prompt before an answer.

A token that does not count stands in its row as the complement of its id, ~id = -1 - id: everything that carries rows (shards, readers,
mixtures, the loader) carries that with them, and whoever takes it for an id fails at once. Folders whose tokens all count hold plain ids.

Invariants: `ids` gives every token back; token 0 of a row is never counted, however it stands there.
"""

from __future__ import annotations

import numpy as np


def uncounted(tokens: np.ndarray) -> np.ndarray:
    """The same ids of a signed type, marked as tokens that do not count."""
    return ~tokens


def ids(rows: np.ndarray) -> np.ndarray:
    """The ids of rows of a signed type, whether they count or not."""
    return rows ^ (rows >> (8 * rows.itemsize - 1))


def counted(rows: np.ndarray) -> np.ndarray:
    """Which tokens of int rows [n, L] count: bool [n, L]."""
    found = rows >= 0
    found[:, 0] = False
    return found
