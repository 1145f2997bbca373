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

A row may be divided over C context ranks by positions: 2C pieces of neighbours, of which rank r has the r-th and, to be as busy as
the others, the r-th from the end (one piece each where there are no more blocks, or no half of a share). A rank holds all streams of its
positions, asks with them, and asks for the keys of its own noisy rows and of every clean one: nothing noisy ever leaves its rank.
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
    context_ranks: int = 1
    """C; above 1 this is the share of `context_rank`, whose `length` is a C-th of the undivided row's and whose clean half is whole."""
    context_rank: int = 0
    ring: bool = False
    """Whether a share meets the keys of the others one rank at a time, instead of having them all at once."""

    @property
    def rows(self) -> int:
        """Rows of the network's input per sample: those that ask."""
        return self.scored_rows + self.clean_rows

    @property
    def key_rows(self) -> int:
        """Rows whose keys they ask for: of a share its own noisy ones, then all clean ones; where there are none, all."""
        return self.own_keys + self.context_ranks * (self.rows - self.own_keys)

    @property
    def own_keys(self) -> int:
        """Rows whose keys no other rank asks for; they come first."""
        return self.scored_rows if self.kind == "block_diffusion" else 0

    @property
    def streams(self) -> int:
        return self.draws + (self.kind == "block_diffusion")

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

    def share(self, rank: int, ranks: int, ring: bool = False) -> AttentionPattern:
        """That of context rank `rank` among `ranks`; itself where there is one. The recipe's rules say what must divide what."""
        if ranks == 1:
            return self
        length = self.length // ranks
        block_size = self.block_size if self.kind == "block_diffusion" else min(self.block_size, length)
        return replace(self, length=length, block_size=block_size, last_clean=True, context_ranks=ranks, context_rank=rank, ring=ring)

    @property
    def undivided(self) -> AttentionPattern:
        """That of which this is a share."""
        return replace(self, length=self.context_ranks * self.length, context_ranks=1, context_rank=0, ring=False)

    @property
    def pieces(self) -> list[range]:
        """The positions of the undivided row that this rank holds, in its order: one run of neighbours, or two of the same length."""
        ranks, rank = self.context_ranks, self.context_rank
        if ranks == 1 or self.length % (2 * (self.block_size if self.kind == "block_diffusion" else 1)):
            return [range(rank * self.length, (rank + 1) * self.length)]
        size = self.length // 2
        return [range(piece * size, (piece + 1) * size) for piece in (rank, 2 * ranks - 1 - rank)]

    def before(self, step: int) -> AttentionPattern:
        """The share of the context rank so many before this one, in a ring: whose keys come in that step."""
        return replace(self, context_rank=(self.context_rank - step) % self.context_ranks)

    def met(self, step: int, device: torch.device | str = "cpu") -> Tensor:
        """The rows of `before(step)` whose keys this share meets in that step, int64: of itself all, of the others those that travel."""
        return torch.arange(self.own_keys if step else 0, self.rows, device=device)

    def undivided_rows(self, rows: Tensor) -> Tensor:
        """Rows that this rank holds, int64 of any shape -> which rows of the undivided stream they are."""
        if self.context_ranks == 1:
            return rows
        stream, here = rows // self.length, rows % self.length
        first, *second = self.pieces
        place = here + first.start
        if second:
            place = torch.where(here < len(first), place, here + (second[0].start - len(first)))
        return stream * (self.context_ranks * self.length) + place

    def undivided_keys(self, keys: Tensor) -> Tensor:
        """Places among the keys that this rank asks for -> which rows of the undivided stream they are."""
        if self.own_keys == 0 or self.context_ranks == 1:
            return keys
        return torch.where(keys < self.own_keys, self.undivided_rows(keys), keys + (self.context_ranks - 1) * self.own_keys)

    def keys_of_rows(self, rows: Tensor) -> Tensor:
        """Rows that this rank holds -> where their own keys lie among those that it asks for."""
        if self.context_ranks == 1:
            return rows
        return torch.where(rows < self.own_keys, rows, self.undivided_rows(rows) - (self.context_ranks - 1) * self.own_keys)

    @property
    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that may attend."""
        if self.context_ranks > 1:
            return sum(self.undivided.pairs_before(piece.stop) - self.undivided.pairs_before(piece.start) for piece in self.pieces)
        return self.pairs_before(self.length)

    def pairs_before(self, position: int) -> int:
        """Those of the queries at the positions before this one, a multiple of the block size, in all streams."""
        n, block = position, self.block_size
        if self.kind == "full":
            return self.draws * n * self.length
        if self.kind == "causal":
            return n * (n + 1) // 2
        rows = min(n, self.clean_rows)
        clean = rows * (rows + block) // 2 if self.clean_half == "block_causal" else rows * (rows + 1) // 2
        return self.draws * (n * (n + block) // 2) + clean


def visible(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    """The definition. `query`: integer rows, `key`: places among the keys, of broadcastable shapes; returns bool of their joint shape."""
    if pattern.context_ranks > 1:
        return visible(pattern.undivided, pattern.undivided_rows(query), pattern.undivided_keys(key))
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
    """bool [rows, key_rows], True where the query row may see the key row. For tests and the naive form: O(L^2) memory."""
    rows, keys = (torch.arange(count, device=device) for count in (pattern.rows, pattern.key_rows))
    return visible(pattern, rows[:, None], keys[None, :])


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
    """The tile nearest to `target` positions that is a multiple of L' and divides L (of a share, its pieces)."""
    blocks = len(pattern.pieces[0]) // pattern.block_size
    sizes = [pattern.block_size * k for k in range(1, blocks + 1) if blocks % k == 0]
    return min(sizes, key=lambda size: (abs(size - target), size))


def tile_mask(pattern: AttentionPattern, tile: int, device: torch.device | str = "cpu") -> Tensor:
    """bool [streams * tile] twice: the mask among the rows of one tile, noisy streams before clean; the same for every tile."""
    return dense(replace(pattern.undivided, length=tile, last_clean=True), device)


def decoding_mask(query_positions: Tensor, key_positions: Tensor, block_size: int, context: int) -> Tensor:
    """bool [n, m] for decoding block by block on clean rows: block a sees blocks a' <= a with (a - a') L' < context.

    Positions, [n] and [m], or those of every sample, [batch, n] and [batch, m] (then [batch, n, m]), are int64 and may lie
    beyond the training context: a block then sees itself and the clean blocks that fit into the `context` tokens that end with it.
    """
    distance = query_positions[..., :, None] // block_size - key_positions[..., None, :] // block_size
    return (distance >= 0) & (distance * block_size < context)


def block_sparse_indices(pattern: AttentionPattern, query_rows: int, tile: int = 128, step: int | None = None) -> dict[str, np.ndarray]:
    """Closed form of the tiles that a block-sparse kernel visits, without ever making the dense mask.

    Returns int32 arrays for `BlockMask.from_kv_blocks`: `kv_num_blocks` [q] and `kv_indices` [q, k] of partly visible
    tiles, `full_kv_num_blocks` and `full_kv_indices` of wholly visible ones, for the first `query_rows` rows. Keys are all that they ask
    for or, in a ring, those that are met in a `step`.
    """
    # A tile may straddle streams: judge it by segments of neighbouring positions that lie in one stream each.
    own, row = pattern.own_keys // pattern.length, range(pattern.context_ranks * pattern.length)
    runs = [(stream, piece) for stream in range(pattern.streams) for piece in pattern.pieces]
    if step is None:
        asked = [(stream, piece) for stream, piece in runs if stream < own] + [(stream, row) for stream in range(own, pattern.streams)]
        key_rows = pattern.key_rows
    else:
        asked = [(stream, piece) for stream in range(own if step else 0, pattern.streams) for piece in pattern.before(step).pieces]
        key_rows = len(pattern.met(step))
    query_tiles, key_tiles = -(-query_rows // tile), -(-key_rows // tile)
    some = np.zeros((query_tiles, key_tiles), bool)
    every = np.ones((query_tiles, key_tiles), bool)
    query_segments, key_segments = _segments(runs, query_rows, tile), _segments(asked, key_rows, tile)
    any_visible, all_visible = _segment_visibility(pattern, query_segments, key_segments)
    where = np.ix_(query_segments["tile"], key_segments["tile"])
    np.logical_or.at(some, where, any_visible)
    np.logical_and.at(every, where, all_visible)
    # Rows beyond the end do not exist; a tile that reaches over the end cannot be taken as full.
    if key_rows % tile:
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


def _segments(runs: list[tuple[int, range]], rows: int, tile: int) -> dict[str, np.ndarray]:
    """The first `rows` rows, cut where a tile or a run ends; `runs`: (stream, positions) of neighbours, one behind the other."""
    starts = np.cumsum([0, *(len(positions) for _, positions in runs)])[:-1]
    edge = np.array(sorted({*range(0, rows, tile), *(int(start) for start in starts if start < rows), rows}))
    first, last = edge[:-1], edge[1:] - 1
    run = np.searchsorted(starts, first, side="right") - 1
    place = np.array([positions.start for _, positions in runs])[run] - starts[run]
    return {"tile": first // tile, "stream": np.array([stream for stream, _ in runs])[run], "first": first + place, "last": last + place}


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
