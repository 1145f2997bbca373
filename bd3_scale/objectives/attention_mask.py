"""Who may attend to whom: the block-diffusion mask, one definition with three uses.

`visible` is the definition (Arriola et al. 2025, section 3.3 and appendix B.6). Everything else is derived from it:
the dense boolean matrix (reference, tests), the mask of one tile (CPU kernel), and the block-sparse indices in closed
form (FlexAttention on CUDA). They agree for every (length, block size); the tests hold them to it.

Invariants: a clean row never sees a noisy one; a noisy row of block b and its clean twin both see (b + 1) L' keys, so
that L^2 + L L' of the 4 L^2 pairs are visible; only `document_segments` depends on the data, so a mask is made once per pattern.

Several noisy draws of a row may share its clean half: the rows are then [x_t^1 ; ... ; x_t^k ; x_0], k + 1 streams. Each draw sees what it
would see without the others, and no draw sees another.

No noisy row sees the clean rows of the last block. A pattern may leave them out (`last_clean`), which leaves exactly L^2 pairs; with
L' = L nothing is left of the clean half, and the pattern is `full` (see `base.block_pattern`).

Documents that share a row can be kept apart (`AttentionPattern.document_end`): every row of the network then has a segment, and a pair is
visible only where the segments, too, are equal. Two things follow from the block-wise factorisation: a noisy block belongs to the
document that goes on at its beginning, because where in it a document ends is what it has to predict (a finer mask would give the answer
away); its clean twin is known, and exact. The token that ends a document begins the next one, as BOS begins a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionPattern:
    """Hashable description of a mask. `length` is L (data tokens), `block_size` is L'.

    kind `block_diffusion`: (draws + 1) L rows, the noisy ones first; `full`: draws x L rows; `causal`: L rows.
    `clean_half` says how clean rows of one block see each other: block_causal (all) or causal.
    """

    kind: Literal["block_diffusion", "causal", "full"]
    length: int
    block_size: int
    clean_half: Literal["block_causal", "causal"] = "block_causal"
    document_end: int | None = None
    """The token after which another document begins that must not see the ones before; None: a row is one text."""
    last_clean: bool = True
    """Whether the clean half has its last block, which no scored row sees."""
    draws: int = 1
    """k, noisy streams of L rows each; 1 for `causal`."""

    @property
    def rows(self) -> int:
        """Rows of the network's input per sample."""
        return self.scored_rows + self.clean_rows

    @property
    def clean_rows(self) -> int:
        """Rows of the clean half, which follow the scored ones."""
        if self.kind != "block_diffusion":
            return 0
        return self.length if self.last_clean else self.length - self.block_size

    @property
    def scored_rows(self) -> int:
        """Rows that can have a loss: the noisy streams, or everything. They come first, draw after draw."""
        return self.draws * self.length

    @property
    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that may attend."""
        n, block = self.length, self.block_size
        if self.kind == "full":
            return self.draws * n * n
        if self.kind == "causal":
            return n * (n + 1) // 2
        rows = self.clean_rows
        clean = rows * (rows + block) // 2 if self.clean_half == "block_causal" else rows * (rows + 1) // 2
        return self.draws * (n * (n + block) // 2) + clean


def visible(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    """The definition. `query`, `key`: integer row indices of any broadcastable shapes; returns bool of their joint shape."""
    n, block, scored = pattern.length, pattern.block_size, pattern.scored_rows
    if pattern.kind == "full":
        return query // n == key // n
    if pattern.kind == "causal":
        return key <= query
    query_noisy, key_noisy = query < scored, key < scored
    query_block, key_block = (query % n) // block, (key % n) // block
    own_block = query_noisy & key_noisy & (query // block == key // block)  # of its own draw, since L' divides L
    before = query_noisy & ~key_noisy & (key_block < query_block)
    clean_order = key_block <= query_block if pattern.clean_half == "block_causal" else key <= query
    return own_block | before | (~query_noisy & ~key_noisy & clean_order)


def dense(pattern: AttentionPattern, device: torch.device | str = "cpu") -> Tensor:
    """bool [rows, rows], True where the query row may see the key row. For tests and the naive form: O(L^2) memory."""
    rows = torch.arange(pattern.rows, device=device)
    return visible(pattern, rows[:, None], rows[None, :])


def document_segments(tokens: np.ndarray, pattern: AttentionPattern) -> np.ndarray:
    """int32 [m, pattern.rows]: the segment of every row of the network, for clean tokens int64 [m, L]; ascending in each stream.

    Rows may see each other only where their segments are equal (and `visible` holds). Token 0 ends nothing: it is the row's BOS.
    """
    ends = tokens == pattern.document_end
    ends[:, 0] = False
    clean = np.cumsum(ends, axis=1, dtype=np.int32)
    if pattern.kind != "block_diffusion":
        return np.tile(clean, pattern.draws)
    before_block = np.maximum(np.arange(pattern.length) // pattern.block_size * pattern.block_size - 1, 0)
    return np.concatenate([np.tile(clean[:, before_block], pattern.draws), clean[:, : pattern.clean_rows]], axis=1)


def tile_length(pattern: AttentionPattern, target: int) -> int:
    """The tile nearest to `target` positions that is a multiple of L' and divides L."""
    blocks = pattern.length // pattern.block_size
    sizes = [pattern.block_size * k for k in range(1, blocks + 1) if blocks % k == 0]
    return min(sizes, key=lambda size: (abs(size - target), size))


def tile_mask(pattern: AttentionPattern, tile: int, device: torch.device | str = "cpu") -> Tensor:
    """bool [(draws + 1) * tile] twice: the mask among the rows of one tile, noisy streams before clean; the same for every tile."""
    return dense(replace(pattern, length=tile, last_clean=True), device)


def decoding_mask(query_positions: Tensor, key_positions: Tensor, block_size: int, context: int) -> Tensor:
    """bool [n, m] for decoding block by block on clean rows: block a sees blocks a' <= a with (a - a') L' < context.

    Positions, [n] and [m], or those of every sample, [batch, n] and [batch, m] (then [batch, n, m]), are int64 and may lie
    beyond the training context: a block then sees itself and the clean blocks that fit into the `context` tokens that end with it.
    """
    distance = query_positions[..., :, None] // block_size - key_positions[..., None, :] // block_size
    return (distance >= 0) & (distance * block_size < context)


def block_sparse_indices(pattern: AttentionPattern, query_rows: int, tile: int = 128) -> dict[str, np.ndarray]:
    """Closed form of the tiles that a block-sparse kernel visits, without ever making the dense mask.

    Returns int32 arrays for `BlockMask.from_kv_blocks`: `kv_num_blocks` [q] and `kv_indices` [q, k] of partly visible
    tiles, `full_kv_num_blocks` and `full_kv_indices` of wholly visible ones, for the first `query_rows` rows.
    """
    query_tiles, key_tiles = -(-query_rows // tile), -(-pattern.rows // tile)
    some = np.zeros((query_tiles, key_tiles), bool)
    every = np.ones((query_tiles, key_tiles), bool)
    # A tile may straddle streams: judge it by segments that lie in one stream each.
    query_segments, key_segments = _segments(pattern, query_rows, tile), _segments(pattern, pattern.rows, tile)
    any_visible, all_visible = _segment_visibility(pattern, query_segments, key_segments)
    where = np.ix_(query_segments["tile"], key_segments["tile"])
    np.logical_or.at(some, where, any_visible)
    np.logical_and.at(every, where, all_visible)
    # Rows beyond the end do not exist; a tile that reaches over the end cannot be taken as full.
    if pattern.rows % tile:
        every[:, -1] = False
    if query_rows % tile:
        every[-1, :] = False
    full, part = some & every, some & ~every
    return {
        "kv_num_blocks": part.sum(1).astype(np.int32),
        "kv_indices": np.argsort(~part, axis=1, kind="stable").astype(np.int32),
        "full_kv_num_blocks": full.sum(1).astype(np.int32),
        "full_kv_indices": np.argsort(~full, axis=1, kind="stable").astype(np.int32),
    }


def _segments(pattern: AttentionPattern, rows: int, tile: int) -> dict[str, np.ndarray]:
    length = pattern.length
    edge = np.array(sorted({*range(0, rows, tile), *range(0, rows, length), rows}))
    first, last = edge[:-1], edge[1:] - 1
    return {"tile": first // tile, "stream": first // length, "first": first % length, "last": last % length}


def _segment_visibility(pattern: AttentionPattern, query: dict[str, Any], key: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    q = {name: value[:, None] for name, value in query.items()}
    k = {name: value[None, :] for name, value in key.items()}
    same = q["stream"] == k["stream"]
    if pattern.kind == "full":
        return same, same
    causal = k["first"] <= q["last"], k["last"] <= q["first"]
    if pattern.kind == "causal":
        return causal
    q_low, q_high, k_low, k_high = (x // pattern.block_size for x in (q["first"], q["last"], k["first"], k["last"]))
    own = (k_low <= q_high) & (k_high >= q_low), (q_low == q_high) & (k_low == q_low) & (k_high == q_low)
    before = k_low < q_high, k_high < q_low
    clean = (k_low <= q_high, k_high <= q_low) if pattern.clean_half == "block_causal" else causal
    q_noisy, k_noisy = q["stream"] < pattern.draws, k["stream"] < pattern.draws
    cases = [q_noisy & same, q_noisy & ~k_noisy, ~q_noisy & same]
    any_visible = np.select(cases, [own[0], before[0], clean[0]], False)
    all_visible = np.select(cases, [own[1], before[1], clean[1]], False)
    return any_visible, all_visible
