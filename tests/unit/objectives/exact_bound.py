"""The exact bound of small blocks: the reference that Monte-Carlo losses are tested against (docs/objective.md section 7, property 5)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

LARGEST_EXACT_BLOCK = 6


def _mask_weight(masked: int, size: int, bounds: tuple[float, float]) -> float:
    """Integral of p^(m-1) (1-p)^(n-m) over p in `bounds`; (m-1)! (n-m)! / n! over the whole of [0, 1]."""
    if bounds == (0.0, 1.0):
        return math.factorial(masked - 1) * math.factorial(size - masked) / math.factorial(size)
    clean = size - masked
    terms = (
        (-1) ** k * math.comb(clean, k) * (bounds[1] ** (masked + k) - bounds[0] ** (masked + k)) / (masked + k) for k in range(clean + 1)
    )
    return math.fsum(terms)


def exact_block_nelbo(
    log_probabilities: Callable[[np.ndarray], np.ndarray],
    tokens: np.ndarray,
    mask_id: int,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> float:
    """The exact bound of one block in nats (a sum over its tokens), by enumerating all masks with at least one masked token.

    The mask probability integrates out: a mask with m of n tokens masked has the weight (m-1)! (n-m)! / n!, times the
    -log p of its masked tokens, whatever the schedule. `bounds` restricts the mask probability p and gives the integral
    over that part only (not divided by its width): what is missing from the bound at U[1e-3, 1] is the rest.

    `log_probabilities`: int64 [k, n] blocks, partly `mask_id` -> float [k, n, V], log p of every token given the block and
    whatever precedes it (closed over). `tokens`: int64 [n], n <= 6. In the first block of a row pass the tokens after
    token 0 and close over token 0: it is never masked and not counted. Raises ValueError for longer blocks.
    """
    tokens = np.asarray(tokens, np.int64)
    size = len(tokens)
    if not 1 <= size <= LARGEST_EXACT_BLOCK:
        raise ValueError(f"the exact bound enumerates 2^n masks and takes 1 to {LARGEST_EXACT_BLOCK} tokens, got {size}")
    masks = (np.arange(1, 2**size)[:, None] >> np.arange(size)) & 1 == 1
    log_p = np.asarray(log_probabilities(np.where(masks, mask_id, tokens)), np.float64)
    of_tokens = log_p[:, np.arange(size), tokens]
    weights = np.array([_mask_weight(int(count), size, bounds) for count in masks.sum(1)])
    return float(-(weights[:, None] * np.where(masks, of_tokens, 0.0)).sum())
