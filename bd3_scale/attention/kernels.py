"""Attention kernels under an `AttentionPattern`: tiled (CPU and anywhere), FlexAttention (CUDA), dense (reference).

All take q [query_rows, batch, heads, d] and k, v [pattern.key_rows, batch, kv_heads, d], sequence first, with
heads = groups x kv_heads (head h reads kv head h // groups; K and V are never repeated), and return
[query_rows, batch, heads, d]. `query_rows` is all rows, or the scored half alone (the last layer needs no more).
`segments` int [batch, key_rows], where given, keeps rows of different segments apart on top of the pattern (see `mask`).
Keys are as many as rows, but for the share of a context rank, which asks for more than it holds (see `mask`); in a ring a
kernel is given those that it holds, and meets the others one rank at a time.

The tiled form has a file of its own, `tiled.py`, and so has FlexAttention in a ring, `flex_ring.py`. Segments become masks
that are made where they are needed (forward and backward) and nowhere else.
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
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from bd3_scale.attention.flex_ring import FlexRing, heads_first
from bd3_scale.attention.mask import AttentionPattern, block_sparse_indices, dense, tile_length, visible
from bd3_scale.attention.tiled import TiledAttention, additive_tile_mask, same_segments
from bd3_scale.compiling import compiled_whole
from bd3_scale.errors import RecipeError
from bd3_scale.recipe.environment import resolve_attention

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
        mask = mask & same_segments(_of_queries(segments, pattern, q.shape[0]), segments)
    return _sdpa(q, k, v, mask)


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, segments: Tensor | None = None) -> Tensor:
    """Exact attention that computes only the visible quarter; see the module's docstring."""
    if not pattern.ring and (pattern.kind == "full" or (pattern.kind == "causal" and pattern.context_ranks == 1)):
        if segments is None:
            return _one_stream(q, k, v, pattern)
        # By query tiles, so that the masks are of L * tile, not L^2.
        starts = range(0, q.shape[0], CPU_TILE)
        return torch.cat([_causal_tile(q, k, v, pattern, segments, start, min(start + CPU_TILE, q.shape[0])) for start in starts])
    # The rows of a tile are one masked problem: the more streams there are, the shorter it is.
    tile = pattern.length if pattern.kind == "full" else tile_length(pattern, 2 * CPU_TILE // pattern.streams)
    return TiledAttention.apply(q, k, v, pattern, tile, segments)


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
    mask = _block_mask(pattern, q.shape[0], q.device, segments) if block_mask is None else block_mask
    options: dict[str, Any] = {"enable_gqa": q.shape[2] != k.shape[2], "kernel_options": _kernel_options(q, backend)}
    if pattern.ring:
        run = _flex(flex_with_lse, q.is_cuda, backend)
        return FlexRing.apply(q, k, v, pattern, lambda *given: run(*given, **options), mask)
    run = _flex(torch_flex_attention, q.is_cuda, backend)
    return run(*(heads_first(t) for t in (q, k, v)), block_mask=mask, **options).permute(2, 0, 1, 3)


def block_mask_of(kernel: str, pattern: AttentionPattern, query_rows: int, device: torch.device, segments: Tensor | None) -> Any:
    """The `BlockMask` that `attend` needs where `kernel` is FlexAttention's, in a ring one of every step; None where it needs none."""
    if resolve_attention(kernel, device.type) not in BACKENDS or _needs_no_mask(pattern, segments):
        return None
    return _block_mask(pattern, query_rows, device, segments)


def _block_mask(pattern: AttentionPattern, query_rows: int, device: torch.device, segments: Tensor | None) -> Any:
    def of(step: int | None) -> BlockMask:
        if segments is None:
            return block_mask(pattern, query_rows, device, step)
        return document_block_mask(pattern, query_rows, segments, step)

    return tuple(of(step) for step in range(pattern.context_ranks)) if pattern.ring else of(None)


def _needs_no_mask(pattern: AttentionPattern, segments: Tensor | None) -> bool:
    """Whether every row sees all of its stream, or all before it."""
    alone = pattern.kind == "full" or (pattern.kind == "causal" and pattern.context_ranks == 1)
    return segments is None and alone and not pattern.ring


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


def _of_queries(segments: Tensor, pattern: AttentionPattern, query_rows: int) -> Tensor:
    """Those of the first rows, [batch, query_rows], of those of all keys, [batch, key_rows]."""
    if pattern.context_ranks == 1:
        return segments[:, :query_rows]
    return segments[:, pattern.keys_of_rows(torch.arange(query_rows, device=segments.device))]


def _causal_tile(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, segments: Tensor, start: int, stop: int) -> Tensor:
    keys = stop if pattern.kind == "causal" else len(k)
    rows = torch.arange(pattern.rows, device=q.device)
    mask = visible(pattern, rows[start:stop, None], rows[None, :keys]) & same_segments(segments[:, start:stop], segments[:, :keys])
    return _sdpa(q[start:stop], k[:keys], v[:keys], mask)


@lru_cache(maxsize=8)
def _dense_mask(pattern: AttentionPattern, device: torch.device) -> Tensor:
    return dense(pattern, device)


# -- FlexAttention -----------------------------------------------------------------------------------------------------


def flex_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, **options: Any) -> tuple[Tensor, Tensor]:
    """Heads first, [batch, heads, rows, d]: the output and its natural log-sum-exp, -inf of a row that sees nothing."""
    out, more = torch_flex_attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True), **options)
    return out, more.lse


KEY_TILE = {64: 64}
"""Keys of a forward tile by head size in 16 bits, where torch's own choice is slower: 128 takes 0.210 ms of an H200 where 64 take 0.152."""


def _kernel_options(q: Tensor, backend: str | None) -> dict[str, Any] | None:
    options: dict[str, Any] = {} if backend is None else {"BACKEND": backend}
    if q.is_cuda and q.element_size() == 2 and q.shape[-1] in KEY_TILE and backend != "FLASH":
        options["fwd_BLOCK_N"] = KEY_TILE[q.shape[-1]]
    return options or None


def _flex(function: Callable[..., Any], compiled: bool, backend: str | None) -> Callable[..., Any]:
    """`function`, which calls FlexAttention, as it runs here."""
    if backend is not None and not compiled:  # uncompiled, it would be taken and do nothing
        raise RecipeError(f"the backend {backend} of FlexAttention needs CUDA; set model.attention=auto")
    if torch.compiler.is_compiling() or not compiled:
        return function
    return _compiled_flex(function)


@lru_cache(maxsize=2)
def _compiled_flex(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled_whole(function)


@lru_cache(maxsize=256)
def block_mask(pattern: AttentionPattern, query_rows: int, device: torch.device, step: int | None = None) -> Any:
    """The `BlockMask` of a pattern (of a ring: of what is met in a `step`), built once from closed-form indices, never from a dense one."""
    indices = block_sparse_indices(pattern, query_rows, 128, step)
    tensors: dict[str, Any] = {name: torch.from_numpy(value)[None, None].to(device) for name, value in indices.items()}
    sees, keys = _visibility(pattern, query_rows, device, step)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key)

    return BlockMask.from_kv_blocks(**tensors, BLOCK_SIZE=128, mask_mod=mask_mod, seq_lengths=(query_rows, keys))


def _visibility(
    pattern: AttentionPattern, query_rows: int, device: torch.device, step: int | None
) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """`visible` of the rows of a pattern and its keys, or those that are met in a `step`; and how many keys there are."""
    if step is None:
        # A copy, which is never the very object that the stream has: compiled code would look at that, too.
        own = replace(pattern)
        return lambda query, key: visible(own, query, key), pattern.key_rows
    # By numbers that are data, of the undivided row: one kernel does the parts of all ranks.
    whole = pattern.undivided
    rows = pattern.undivided_rows(torch.arange(query_rows, device=device)).int()
    keys = pattern.before(step).undivided_rows(pattern.met(step, device)).int()
    return lambda query, key: visible(whole, rows[query], keys[key]), len(keys)


def document_block_mask(pattern: AttentionPattern, query_rows: int, segments: Tensor, step: int | None = None) -> Any:
    """The `BlockMask` of a pattern and the segments of each sample, int [batch, key_rows], without waiting for the device.

    `step`: as in `block_mask`; the segments are those of all ranks.
    A tile of pairs is visited where the ranges of its segments meet, and needs no mask where both are one and the same segment.
    """
    tile, batch = 128, len(segments)
    partly, wholly = _tile_tables(pattern, query_rows, tile, segments.device, step)
    asking = _of_queries(segments, pattern, query_rows)
    sees, keys = _visibility(pattern, query_rows, segments.device, step)
    if step is not None:
        segments = segments[:, pattern.before(step).keys_of_rows(pattern.met(step, segments.device))]
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
        return sees(query, key) & (asking[sample, query] == segments[sample, key])

    assert tensors["kv_indices"].shape[0] == batch
    return BlockMask.from_kv_blocks(**tensors, BLOCK_SIZE=tile, mask_mod=mask_mod, seq_lengths=(query_rows, keys))


def _ranges(segments: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """The least and the largest segment of every tile of rows: [batch, tiles] of [batch, rows]."""
    short = -segments.shape[1] % tile
    tiles = F.pad(segments.float()[:, None], (0, short), mode="replicate")[:, 0].unflatten(1, (-1, tile))
    return tiles.amin(-1), tiles.amax(-1)


@lru_cache(maxsize=256)
def _tile_tables(
    pattern: AttentionPattern, query_rows: int, tile: int, device: torch.device, step: int | None = None
) -> tuple[Tensor, Tensor]:
    """bool [query tiles, key tiles] each: tiles of pairs that are visible in part, and those that are wholly."""
    indices = block_sparse_indices(pattern, query_rows, tile, step)
    tables = []
    for name in ("kv", "full_kv"):
        counts, order = indices[f"{name}_num_blocks"], indices[f"{name}_indices"]
        table = np.zeros(order.shape, bool)
        np.put_along_axis(table, order, np.arange(order.shape[1]) < counts[:, None], axis=1)
        tables.append(torch.from_numpy(table).to(device))
    return tables[0], tables[1]


def forget_masks() -> None:
    """Let go of all masks of all kernels; they are made again when they are needed."""
    for cached in (_dense_mask, block_mask, _tile_tables, additive_tile_mask):
        cached.cache_clear()
