"""The tiled form of attention under an `AttentionPattern`: exact, on CPU, and no more than the pairs that are visible.

Cut the L positions into tiles of T. Among the 2T rows of one tile the mask is the block-diffusion mask of a sequence of length T (small,
the same for all tiles); every *earlier* tile is seen whole by both halves, and only its clean half (with k draws: (k + 1) T rows of
k + 1 streams). So attention = one masked call over all tiles at once + one unmasked call per tile, merged by their log-sum-exp. No K or V
is copied for the long part and nothing of size L^2 exists. The tiles of a share are those of its positions; what is earlier than a tile
is then a longer part of the clean keys. A causal share is a clean half alone.

In a ring (`AttentionPattern.ring`) the clean keys of the other context ranks come one rank at a time and are merged in the same way; in
the backward they come again, with the gradients that are theirs. So no rank has more than two ranks' at once, and keeps its own alone.

Segments become masks of these calls, made where they are needed (forward and backward) and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bd3_scale.attention.context_keys import travelling, travelling_with_gradients
from bd3_scale.attention.mask import AttentionPattern, tile_mask

HIDDEN = -1e30
"""Added to the logits of keys of another segment. Not -inf: a query may see no key of an earlier tile, and its log-sum-exp must stay a
number, which then weighs nothing beside that of its own tile."""


def same_segments(query_segments: Tensor, key_segments: Tensor) -> Tensor:
    """bool [batch, 1, queries, keys] of int [batch, queries] and [batch, keys]."""
    return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]


@lru_cache(maxsize=16)
def additive_tile_mask(pattern: AttentionPattern, tile: int, streams: int, groups: int, dtype: torch.dtype) -> Tensor:
    """[groups * streams * tile, all streams * tile]: 0 where visible, -inf elsewhere, for query rows ordered (group, stream, position)."""
    mask = tile_mask(pattern, tile)[: streams * tile].repeat(groups, 1)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)


def _attend_backward(saved: list[Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
    """`saved`: gradient of the output, q, k, v, output, log-sum-exp. With the merged output and log-sum-exp of all keys
    this returns the part of the merged gradient that belongs to these keys."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*saved, 0.0, False, attn_mask=mask)


def _filled(x: Tensor, rows: int) -> Tensor:
    """x [n, ...] with zeros behind it, [rows, ...]; x itself where nothing is missing."""
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])]) if len(x) < rows else x


class Tiles:
    """How rows are regrouped: q to [batch, tiles, parts, kv_heads, rows, d], k and v likewise.

    Where the clean half is short of its last block, zeros stand in the last tile for what nobody sees.
    Where tile = L', no mask is needed inside a tile if the streams are kept apart (parts = streams that ask); otherwise all of a
    tile are the rows of one small masked problem (parts = 1). Where every row sees its whole stream (`full`, of a ring), the rows that a
    rank holds are one tile.
    """

    def __init__(self, q: Tensor, k: Tensor, pattern: AttentionPattern, tile: int, segments: Tensor | None) -> None:
        self.pattern, self.tile, self.segments = pattern, tile, segments
        self.batch, self.kv_heads, self.head_size = k.shape[1:]
        self.groups = q.shape[2] // self.kv_heads
        self.query_rows = q.shape[0]
        self.streams = pattern.streams
        self.asking = -(-q.shape[0] // pattern.length)
        own = pattern.keys_of_rows(torch.arange(pattern.rows, device=q.device)) if pattern.context_ranks > 1 else None
        self.at_hand = pattern.pieces if pattern.ring else [range(pattern.context_ranks * pattern.length)]
        """The positions of the clean keys that are given."""
        self.own = None if pattern.ring else own
        """Where the keys of the rows that a share holds lie among those that are given; None: they are all."""
        if segments is not None:
            held = segments if own is None else segments[:, own]
            self.segments = _filled(held.t(), self.streams * pattern.length).t()
            self.clean_segments = segments[:, pattern.own_keys :]
        self.tiles = pattern.length // tile
        self.starts = [start for piece in pattern.pieces for start in piece[::tile]]
        blocks_apart = tile == pattern.block_size and pattern.clean_half == "block_causal"
        self.apart = pattern.kind == "full" or (pattern.kind == "block_diffusion" and blocks_apart)
        self.dtype = q.dtype
        # Compiled code knows no cache, and warns of it.
        make = additive_tile_mask.__wrapped__ if torch.compiler.is_compiling() else additive_tile_mask
        self.mask = None if self.apart else make(pattern, tile, self.asking, self.groups, q.dtype)

    def near_mask(self) -> Tensor | None:
        """Of the rows of each tile among themselves, with the segments: [batch * tiles * parts, 1, rows, keys]."""
        if self.segments is None:
            return self.mask
        tiled = self.segments.unflatten(1, (self.streams, self.tiles, self.tile)).transpose(1, 2)  # [batch, tiles, stream, position]
        if self.apart:
            queries = keys = tiled[:, :, : self.asking].flatten(0, 2)
        else:
            queries, keys = tiled[:, :, : self.asking].flatten(2).flatten(0, 1), tiled.flatten(2).flatten(0, 1)
        mask = self._additive(queries, keys)
        if mask is None or self.mask is None:
            return self.mask if mask is None else mask
        return mask + self.mask

    def far_mask(self, j: int, part: int, pieces: list[range], seen: slice) -> Tensor | None:
        """Of the queries of tile j (of one stream, where they are apart) and those `seen` of the keys of `pieces`: [batch, 1, n, m]."""
        if self.segments is None:
            return None
        tiled = self.segments.unflatten(1, (self.streams, self.tiles, self.tile))[:, :, j]
        queries = tiled[:, part] if self.apart else tiled[:, : self.asking].flatten(1)
        return self._additive(queries, torch.cat([self.clean_segments[:, one.start : one.stop] for one in pieces], 1)[:, seen])

    def _additive(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """0 where segments are equal, HIDDEN elsewhere; None where they all are and one may look."""
        same = same_segments(queries.repeat(1, self.groups), keys)
        if not torch.compiler.is_compiling() and bool(same.all()):
            return None
        return torch.zeros(same.shape, dtype=self.dtype).masked_fill_(~same, HIDDEN)

    def queries(self, q: Tensor) -> Tensor:
        q = _filled(q, self.asking * self.pattern.length)
        x = q.reshape(self.asking, self.tiles, self.tile, self.batch, self.kv_heads, self.groups, self.head_size)
        if self.apart:
            return x.permute(3, 1, 0, 4, 5, 2, 6).flatten(4, 5)
        return x.permute(3, 1, 4, 5, 0, 2, 6).flatten(3, 5)[:, :, None]

    def rows_of_queries(self, x: Tensor) -> Tensor:
        """Inverse of `queries`: back to [query_rows, batch, heads, d]."""
        if self.apart:
            x = x.unflatten(4, (self.groups, self.tile)).permute(2, 1, 5, 0, 3, 4, 6)
        else:
            x = x[:, :, 0].unflatten(3, (self.groups, self.asking, self.tile)).permute(4, 1, 5, 0, 2, 3, 6)
        return x.reshape(self.asking * self.pattern.length, self.batch, self.kv_heads * self.groups, self.head_size)[: self.query_rows]

    def keys(self, k: Tensor) -> Tensor:
        k = _filled(k if self.own is None else k[self.own], self.streams * self.pattern.length)
        x = k.reshape(self.streams, self.tiles, self.tile, self.batch, self.kv_heads, self.head_size)
        if self.apart:
            return x[: self.asking].permute(3, 1, 0, 4, 2, 5)
        return x.permute(3, 1, 4, 0, 2, 5).flatten(3, 4)[:, :, None]

    def rows_of_keys(self, x: Tensor) -> Tensor:
        """Inverse of `keys`: back to fp32 [key_rows, batch, kv_heads, d]; what `keys` left out is 0."""
        if self.apart:
            x = x.permute(2, 1, 4, 0, 3, 5)
            x = x if self.asking == self.streams else torch.cat([x, torch.zeros_like(x[:1])])
        else:
            x = x[:, :, 0].unflatten(3, (self.streams, self.tile)).permute(3, 1, 4, 0, 2, 5)
        x = x.reshape(self.streams * self.pattern.length, self.batch, self.kv_heads, self.head_size)[: self.pattern.rows].float()
        return x if self.own is None else x.new_zeros(self.pattern.key_rows, *x.shape[1:]).index_copy_(0, self.own, x)

    def clean(self, k: Tensor) -> Tensor:
        """View [batch, kv_heads, L, d] of the clean half, which later tiles see."""
        return k[self.pattern.own_keys :].permute(1, 2, 0, 3)

    def visits(self, k: Tensor, v: Tensor) -> Iterator[tuple[list[range], Tensor, Tensor]]:
        """(positions, k, v [batch, kv_heads, n, d]) of clean keys, until all have been there: at once, or in a ring from rank to rank."""
        pattern = self.pattern
        yield self.at_hand, self.clean(k), self.clean(v)
        if pattern.ring:
            for step, clean_k, clean_v in travelling(k, v, pattern):
                yield pattern.before(step).pieces, clean_k, clean_v

    def visits_with_gradients(
        self, k: Tensor, v: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> Iterator[tuple[list[range], Tensor, Tensor, Tensor, Tensor]]:
        """The same, each with the fp32 gradients of what is there, to be added to; at the end `grad_k` and `grad_v` have theirs."""
        pattern = self.pattern
        home_k, home_v = self.clean(grad_k), self.clean(grad_v)
        yield self.at_hand, self.clean(k), self.clean(v), home_k, home_v
        if pattern.ring:
            for step, clean_k, clean_v, away_k, away_v in travelling_with_gradients(k, v, home_k, home_v, pattern):
                yield pattern.before(step).pieces, clean_k, clean_v, away_k, away_v

    def earlier(self, pieces: list[range]) -> list[tuple[int, int, slice]]:
        """(tile, part, which of the keys at the positions of `pieces` it sees) for all tiles that see any outside of themselves."""
        parts = range(self.asking if self.apart else 1)
        if self.pattern.kind == "full":
            each = self.pattern.length
            return [] if pieces == self.pattern.pieces else [(0, part, slice(part * each, (part + 1) * each)) for part in parts]
        before = [sum(min(max(start - one.start, 0), len(one)) for one in pieces) for start in self.starts]
        return [(j, part, slice(seen)) for j, seen in enumerate(before) if seen for part in parts]


class TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, tile: int, segments: Tensor | None) -> Tensor:
        tiles = Tiles(q, k, pattern, tile, segments)
        queries = tiles.queries(q)
        keys, values = tiles.keys(k), tiles.keys(v)
        out, lse = _attend_with_lse(queries.flatten(0, 2), keys.flatten(0, 2), values.flatten(0, 2), tiles.near_mask())
        out, lse = out.reshape(queries.shape), lse.reshape(queries.shape[:-1])
        for pieces, clean_k, clean_v in tiles.visits(k, v):
            for j, part, seen in tiles.earlier(pieces):
                mask = tiles.far_mask(j, part, pieces, seen)
                far_out, far_lse = _attend_with_lse(queries[:, j, part], clean_k[:, :, seen], clean_v[:, :, seen], mask)
                # softmax over the union of the keys = the two softmaxes weighted by their shares of the total mass.
                share = torch.sigmoid(far_lse - lse[:, j, part])
                out[:, j, part] = torch.lerp(out[:, j, part].float(), far_out.float(), share[..., None]).to(out.dtype)
                lse[:, j, part] = torch.logaddexp(lse[:, j, part], far_lse)
        ctx.save_for_backward(queries, k, v, out, lse)
        ctx.tiles = tiles
        return tiles.rows_of_queries(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, k, v, out, lse = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        grad = tiles.queries(grads[0])
        keys, values = tiles.keys(k), tiles.keys(v)
        near = [t.flatten(0, 2) for t in (grad, queries, keys, values, out, lse)]
        grad_queries, grad_keys, grad_values = _attend_backward(near, tiles.near_mask())
        grad_queries = grad_queries.reshape(queries.shape)
        # In fp32: a clean row adds up what comes back from every later tile.
        grad_k = tiles.rows_of_keys(grad_keys.reshape(keys.shape))
        grad_v = tiles.rows_of_keys(grad_values.reshape(values.shape))
        for pieces, clean_k, clean_v, clean_grad_k, clean_grad_v in tiles.visits_with_gradients(k, v, grad_k, grad_v):
            for j, part, seen in tiles.earlier(pieces):
                row = [t[:, j, part] for t in (grad, queries, out, lse)]
                mask = tiles.far_mask(j, part, pieces, seen)
                dq, dk, dv = _attend_backward([*row[:2], clean_k[:, :, seen], clean_v[:, :, seen], *row[2:]], mask)
                grad_queries[:, j, part] += dq
                clean_grad_k[:, :, seen] += dk
                clean_grad_v[:, :, seen] += dv
        return tiles.rows_of_queries(grad_queries), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None
