"""Attention kernels under an `AttentionPattern`: tiled (CPU and anywhere), FlexAttention (CUDA), dense (reference).

All take q [query_rows, batch, heads, d] and k, v [pattern.key_rows, batch, kv_heads, d], sequence first, with
heads = groups x kv_heads (head h reads kv head h // groups; K and V are never repeated), and return
[query_rows, batch, heads, d]. `query_rows` is all rows, or the scored half alone (the last layer needs no more).
`segments` int [batch, key_rows], where given, keeps rows of different segments apart on top of the pattern (see `mask`).
Keys are as many as rows, but for the share of a context rank, which asks for more than it holds (see `attention_mask`).

The tiled form rests on one observation: cut the L positions into tiles of T. Among the 2T rows of one tile the mask is
the block-diffusion mask of a sequence of length T (small, the same for all tiles); every *earlier* tile is seen whole
by both halves, and only its clean half (with k draws: (k + 1) T rows of k + 1 streams). So attention = one masked call over
all tiles at once + one unmasked call per tile, merged by their log-sum-exp. No K or V is copied for the long part and nothing of
size L^2 exists. The tiles of a share are those of its positions; what is earlier than a tile is then a longer part of the clean keys.
A causal share is a clean half alone. Segments become masks of
these calls, made where they are needed (forward and backward) and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from bd3_scale.errors import RecipeError
from bd3_scale.model.compiling import compiled_whole
from bd3_scale.objectives.attention_mask import AttentionPattern, block_sparse_indices, dense, tile_length, tile_mask, visible
from bd3_scale.recipe.environment import resolve_attention

HIDDEN = -1e30
"""Added to the logits of keys of another segment. Not -inf: a query may see no key of an earlier tile, and its log-sum-exp must stay a
number, which then weighs nothing beside that of its own tile."""
CPU_TILE = 128
"""Positions per tile of the tiled form, measured on two AVX-512 cores: 64 to 128 is best between L = 256 and 4096."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    kernel: str = "auto",
    segments: Tensor | None = None,
    block_mask: Any = None,
) -> Tensor:
    """Attention by the kernel named, or by the one for q's device (`auto`).

    `block_mask`: what `block_mask_of` gave for all this. FlexAttention makes it itself where it is missing, but not in compiled code.
    """
    made = {} if block_mask is None else {"block_mask": block_mask}
    return KERNELS[resolve_attention(kernel, q.device.type)](q, k, v, pattern, segments, **made)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, segments: Tensor | None = None) -> Tensor:
    """Reference: one call with the dense boolean mask; O(rows^2) memory and four times the work that is needed."""
    mask = _dense_mask(pattern, q.device)[: q.shape[0]]
    if segments is not None:
        mask = mask & _same(_of_queries(segments, pattern, q.shape[0]), segments)
    return _sdpa(q, k, v, mask)


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, segments: Tensor | None = None) -> Tensor:
    """Exact attention that computes only the visible quarter; see the module's docstring."""
    if pattern.kind == "full" or (pattern.kind == "causal" and pattern.context_ranks == 1):
        if segments is None:
            return _one_stream(q, k, v, pattern)
        # By query tiles, so that the masks are of L * tile, not L^2.
        starts = range(0, q.shape[0], CPU_TILE)
        return torch.cat([_causal_tile(q, k, v, pattern, segments, start, min(start + CPU_TILE, q.shape[0])) for start in starts])
    # The rows of a tile are one masked problem: the more streams there are, the shorter it is.
    return _TiledAttention.apply(q, k, v, pattern, tile_length(pattern, 2 * CPU_TILE // pattern.streams), segments)


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    segments: Tensor | None = None,
    backend: str | None = None,
    block_mask: Any = None,
) -> Tensor:
    """FlexAttention with the closed-form BlockMask; compiled on CUDA (forward only where Flex has no backward: CPU).

    `backend`: torch's `BACKEND` kernel option; without one torch chooses. Raises RecipeError where none could be taken: on CPU.
    """
    if _needs_no_mask(pattern, segments):
        return _one_stream(q, k, v, pattern)
    run = _flex(q.is_cuda, backend)
    mask = _block_mask(pattern, q.shape[0], q.device, segments) if block_mask is None else block_mask
    heads_first = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    options = None if backend is None else {"BACKEND": backend}
    return run(*heads_first, block_mask=mask, enable_gqa=q.shape[2] != k.shape[2], kernel_options=options).permute(2, 0, 1, 3)


def block_mask_of(kernel: str, pattern: AttentionPattern, query_rows: int, device: torch.device, segments: Tensor | None) -> Any:
    """The `BlockMask` that `attend` needs where `kernel` is FlexAttention's; None where it needs none."""
    if resolve_attention(kernel, device.type) not in BACKENDS or _needs_no_mask(pattern, segments):
        return None
    return _block_mask(pattern, query_rows, device, segments)


def _block_mask(pattern: AttentionPattern, query_rows: int, device: torch.device, segments: Tensor | None) -> Any:
    return block_mask(pattern, query_rows, device) if segments is None else document_block_mask(pattern, query_rows, segments)


def _needs_no_mask(pattern: AttentionPattern, segments: Tensor | None) -> bool:
    """Whether every row sees all of its stream, or all before it."""
    return segments is None and (pattern.kind == "full" or (pattern.kind == "causal" and pattern.context_ranks == 1))


BACKENDS = {"flex": None, "flex_triton": "TRITON", "flex_flash": "FLASH"}
"""Kernels that are FlexAttention's, each with its backend."""
KERNELS: dict[str, Callable[..., Tensor]] = {
    "tiled": tiled_attention,
    **{name: partial(flex_attention, backend=backend) for name, backend in BACKENDS.items()},
    "dense": dense_attention,
}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3)


def _one_stream(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    """Attention of rows that have no clean half; each draw of a sample is one of its own."""
    if pattern.draws == 1:
        return _sdpa(q, k, v, None, causal=pattern.kind == "causal")
    q, k, v = (t.unflatten(0, (pattern.draws, -1)).transpose(0, 1).flatten(1, 2) for t in (q, k, v))
    return _sdpa(q, k, v, None).unflatten(1, (pattern.draws, -1)).transpose(0, 1).flatten(0, 1)


def _same(query_segments: Tensor, key_segments: Tensor) -> Tensor:
    """bool [batch, 1, queries, keys] of int [batch, queries] and [batch, keys]."""
    return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]


def _of_queries(segments: Tensor, pattern: AttentionPattern, query_rows: int) -> Tensor:
    """Those of the first rows, [batch, query_rows], of those of all keys, [batch, key_rows]."""
    if pattern.context_ranks == 1:
        return segments[:, :query_rows]
    return segments[:, pattern.keys_of_rows(torch.arange(query_rows, device=segments.device))]


def _causal_tile(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, segments: Tensor, start: int, stop: int) -> Tensor:
    keys = stop if pattern.kind == "causal" else len(k)
    rows = torch.arange(pattern.rows, device=q.device)
    mask = visible(pattern, rows[start:stop, None], rows[None, :keys]) & _same(segments[:, start:stop], segments[:, :keys])
    return _sdpa(q[start:stop], k[:keys], v[:keys], mask)


@lru_cache(maxsize=8)
def _dense_mask(pattern: AttentionPattern, device: torch.device) -> Tensor:
    return dense(pattern, device)


# -- FlexAttention -----------------------------------------------------------------------------------------------------


def _flex(compiled: bool, backend: str | None) -> Callable[..., Any]:
    if backend is not None and not compiled:  # uncompiled, it would be taken and do nothing
        raise RecipeError(f"the backend {backend} of FlexAttention needs CUDA; set model.attention=auto")
    if torch.compiler.is_compiling() or not compiled:
        return torch_flex_attention
    return _compiled_flex()


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return compiled_whole(torch_flex_attention)


@lru_cache(maxsize=32)
def block_mask(pattern: AttentionPattern, query_rows: int, device: torch.device) -> Any:
    """The `BlockMask` of a pattern, built once from closed-form indices (never from a dense mask)."""
    indices = block_sparse_indices(pattern, query_rows, tile=128)
    tensors: dict[str, Any] = {name: torch.from_numpy(value)[None, None].to(device) for name, value in indices.items()}

    # A copy, which is never the very object that the stream has: compiled code would look at that, too.
    own = replace(pattern)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(own, query, key)

    return BlockMask.from_kv_blocks(**tensors, BLOCK_SIZE=128, mask_mod=mask_mod, seq_lengths=(query_rows, pattern.key_rows))


def document_block_mask(pattern: AttentionPattern, query_rows: int, segments: Tensor) -> Any:
    """The `BlockMask` of a pattern and the segments of each sample, int [batch, key_rows], without waiting for the device.

    A tile of pairs is visited where the ranges of its segments meet, and needs no mask where both are one and the same segment.
    """
    tile, batch = 128, len(segments)
    partly, wholly = _tile_tables(pattern, query_rows, tile, segments.device)
    asking = _of_queries(segments, pattern, query_rows)
    (q_low, q_high), (low, high) = _ranges(asking, tile), _ranges(segments, tile)
    meets = (q_low[:, :, None] <= high[:, None]) & (low[:, None] <= q_high[:, :, None])
    one = (q_low == q_high)[:, :, None] & (low == high)[:, None] & (q_low[:, :, None] == low[:, None])
    part = (partly & meets) | (wholly & meets & ~one)
    tables = {"kv": part, "full_kv": wholly & one}
    tensors: dict[str, Any] = {}
    for name, table in tables.items():
        tensors[f"{name}_num_blocks"] = table.sum(-1, dtype=torch.int32)[:, None]
        tensors[f"{name}_indices"] = (~table).to(torch.int8).argsort(dim=-1, stable=True).to(torch.int32)[:, None]

    def mask_mod(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(pattern, query, key) & (asking[sample, query] == segments[sample, key])

    assert tensors["kv_indices"].shape[0] == batch
    return BlockMask.from_kv_blocks(**tensors, BLOCK_SIZE=tile, mask_mod=mask_mod, seq_lengths=(query_rows, pattern.key_rows))


def _ranges(segments: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """The least and the largest segment of every tile of rows: [batch, tiles] of [batch, rows]."""
    short = -segments.shape[1] % tile
    tiles = F.pad(segments.float()[:, None], (0, short), mode="replicate")[:, 0].unflatten(1, (-1, tile))
    return tiles.amin(-1), tiles.amax(-1)


@lru_cache(maxsize=32)
def _tile_tables(pattern: AttentionPattern, query_rows: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """bool [query tiles, key tiles] each: tiles of pairs that are visible in part, and those that are wholly."""
    indices = block_sparse_indices(pattern, query_rows, tile)
    tables = []
    for name in ("kv", "full_kv"):
        counts, order = indices[f"{name}_num_blocks"], indices[f"{name}_indices"]
        table = np.zeros(order.shape, bool)
        np.put_along_axis(table, order, np.arange(order.shape[1]) < counts[:, None], axis=1)
        tables.append(torch.from_numpy(table).to(device))
    return tables[0], tables[1]


# -- The tiled form ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _additive_tile_mask(pattern: AttentionPattern, tile: int, streams: int, groups: int, dtype: torch.dtype) -> Tensor:
    """[groups * streams * tile, all streams * tile]: 0 where visible, -inf elsewhere, for query rows ordered (group, stream, position)."""
    mask = tile_mask(pattern, tile)[: streams * tile].repeat(groups, 1)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def forget_masks() -> None:
    """Let go of all masks of all kernels; they are made again when they are needed."""
    for cached in (_dense_mask, block_mask, _tile_tables, _additive_tile_mask):
        cached.cache_clear()


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)


def _attend_backward(saved: list[Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
    """`saved`: gradient of the output, q, k, v, output, log-sum-exp. With the merged output and log-sum-exp of all keys
    this returns the part of the merged gradient that belongs to these keys."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*saved, 0.0, False, attn_mask=mask)


def _filled(x: Tensor, rows: int) -> Tensor:
    """x [n, ...] with zeros behind it, [rows, ...]; x itself where nothing is missing."""
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])]) if len(x) < rows else x


class _Tiles:
    """How rows are regrouped: q to [batch, tiles, parts, kv_heads, rows, d], k and v likewise.

    Where the clean half is short of its last block, zeros stand in the last tile for what nobody sees.
    Where tile = L', no mask is needed inside a tile if the streams are kept apart (parts = streams that ask); otherwise all of a
    tile are the rows of one small masked problem (parts = 1).
    """

    def __init__(self, q: Tensor, k: Tensor, pattern: AttentionPattern, tile: int, segments: Tensor | None) -> None:
        self.pattern, self.tile, self.segments = pattern, tile, segments
        self.batch, self.kv_heads, self.head_size = k.shape[1:]
        self.groups = q.shape[2] // self.kv_heads
        self.query_rows = q.shape[0]
        self.streams = pattern.streams
        self.asking = -(-q.shape[0] // pattern.length)
        self.own: Tensor | None = None
        """Where the keys of the rows that a share holds lie among all that it asks for; None: they are all."""
        if pattern.context_ranks > 1:
            self.own = pattern.keys_of_rows(torch.arange(pattern.rows, device=q.device))
        if segments is not None:
            held = segments if self.own is None else segments[:, self.own]
            self.segments = _filled(held.t(), self.streams * pattern.length).t()
            self.clean_segments = segments[:, pattern.own_keys :]
        self.tiles = pattern.length // tile
        self.starts = [start for piece in pattern.pieces for start in piece[::tile]]
        self.apart = pattern.kind == "block_diffusion" and tile == pattern.block_size and pattern.clean_half == "block_causal"
        self.dtype = q.dtype
        # Compiled code knows no cache, and warns of it.
        make = _additive_tile_mask.__wrapped__ if torch.compiler.is_compiling() else _additive_tile_mask
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

    def far_mask(self, j: int, part: int, seen: int) -> Tensor | None:
        """Of the queries of tile j (of one stream, where they are apart) and the first `seen` clean keys: [batch, 1, rows, seen]."""
        if self.segments is None:
            return None
        tiled = self.segments.unflatten(1, (self.streams, self.tiles, self.tile))[:, :, j]
        queries = tiled[:, part] if self.apart else tiled[:, : self.asking].flatten(1)
        return self._additive(queries, self.clean_segments[:, :seen])

    def _additive(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """0 where segments are equal, HIDDEN elsewhere; None where they all are and one may look."""
        same = _same(queries.repeat(1, self.groups), keys)
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

    def earlier(self) -> list[tuple[int, int, int]]:
        """(tile, part, number of earlier clean positions) for all tiles that have earlier ones."""
        parts = self.asking if self.apart else 1
        return [(j, part, start) for j, start in enumerate(self.starts) if start for part in range(parts)]


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, tile: int, segments: Tensor | None) -> Tensor:
        tiles = _Tiles(q, k, pattern, tile, segments)
        queries = tiles.queries(q)
        keys, values = tiles.keys(k), tiles.keys(v)
        out, lse = _attend_with_lse(queries.flatten(0, 2), keys.flatten(0, 2), values.flatten(0, 2), tiles.near_mask())
        out, lse = out.reshape(queries.shape), lse.reshape(queries.shape[:-1])
        clean_k, clean_v = tiles.clean(k), tiles.clean(v)
        for j, part, seen in tiles.earlier():
            far_out, far_lse = _attend_with_lse(
                queries[:, j, part], clean_k[:, :, :seen], clean_v[:, :, :seen], tiles.far_mask(j, part, seen)
            )
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
        tiles: _Tiles = ctx.tiles
        grad = tiles.queries(grads[0])
        keys, values = tiles.keys(k), tiles.keys(v)
        near = [t.flatten(0, 2) for t in (grad, queries, keys, values, out, lse)]
        grad_queries, grad_keys, grad_values = _attend_backward(near, tiles.near_mask())
        grad_queries = grad_queries.reshape(queries.shape)
        # In fp32: a clean row adds up what comes back from every later tile.
        grad_k = tiles.rows_of_keys(grad_keys.reshape(keys.shape))
        grad_v = tiles.rows_of_keys(grad_values.reshape(values.shape))
        clean_k, clean_v, clean_grad_k, clean_grad_v = (tiles.clean(t) for t in (k, v, grad_k, grad_v))
        for j, part, seen in tiles.earlier():
            row = [t[:, j, part] for t in (grad, queries, out, lse)]
            mask = tiles.far_mask(j, part, seen)
            dq, dk, dv = _attend_backward([*row[:2], clean_k[:, :, :seen], clean_v[:, :, :seen], *row[2:]], mask)
            grad_queries[:, j, part] += dq
            clean_grad_k[:, :, :seen] += dk
            clean_grad_v[:, :, :seen] += dv
        return tiles.rows_of_queries(grad_queries), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None
