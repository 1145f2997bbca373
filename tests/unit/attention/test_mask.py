"""The mask's forms are one mask: each is compared with a definition written out here, pair by pair, in plain Python."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.attention.mask import (
    AttentionPattern,
    block_sparse_indices,
    decoding_mask,
    dense,
    document_segments,
    tile_length,
    tile_mask,
)

SHAPES = [(length, block) for length in (1, 2, 6, 7, 12, 13, 16, 30, 64) for block in range(1, length + 1) if length % block == 0]
LONG = [(130, 13), (192, 1), (200, 8), (200, 200), (256, 16), (257, 257)]
"""Longer than the tile of 128: its tiles straddle the two halves, or one of them is not filled."""


def patterns(shapes: list[tuple[int, int]]) -> list[AttentionPattern]:
    both = [AttentionPattern("block_diffusion", *shape, clean_half=half) for shape in shapes for half in ("block_causal", "causal")]  # type: ignore[arg-type]
    both += [replace(pattern, last_clean=False) for pattern in both]
    both += [replace(pattern, draws=draws) for draws in (2, 3) for pattern in both[draws::5]]
    several = [AttentionPattern("full", length, length, draws=3) for length, _ in shapes[::4]]
    return [*both, *several, *(AttentionPattern(kind, length, 1) for length, _ in shapes for kind in ("causal", "full"))]  # type: ignore[arg-type]


def spelled_out(pattern: AttentionPattern) -> Tensor:
    """docs/objective.md section 2, pair by pair."""
    n, block = pattern.length, pattern.block_size
    names = [(draw, i) for draw in range(pattern.draws) for i in range(n)] + [("clean", i) for i in range(pattern.clean_rows)]

    def sees(q: int, k: int) -> bool:
        (of_q, q), (of_k, k) = names[q], names[k]  # type: ignore[assignment]
        if pattern.kind != "block_diffusion":
            return of_q == of_k if pattern.kind == "full" else k <= q
        same, before = k // block == q // block, k // block < q // block
        if of_q != "clean":
            return before if of_k == "clean" else of_q == of_k and same
        if of_k != "clean":
            return False
        return before or (same and (pattern.clean_half == "block_causal" or k <= q))

    return torch.tensor([[sees(q, k) for k in range(pattern.rows)] for q in range(pattern.rows)])


def test_dense_form_and_its_count_are_the_definition() -> None:
    for pattern in patterns(SHAPES):
        mask = dense(pattern)
        assert torch.equal(mask, spelled_out(pattern)), pattern
        assert mask.sum() == pattern.visible_pairs, pattern
        assert mask.shape == (pattern.rows, pattern.rows) and pattern.scored_rows == pattern.draws * pattern.length


@pytest.mark.parametrize(("length", "block"), SHAPES)
def test_closed_forms(length: int, block: int) -> None:
    mask = dense(AttentionPattern("block_diffusion", length, block))
    assert mask.sum() == length * length + length * block
    seen = (torch.arange(length) // block + 1) * block
    assert torch.equal(mask.sum(1), torch.cat([seen, seen])), "a noisy row of block b and its clean twin see (b + 1) L' keys"
    noisy, before, leak, clean = mask[:length, :length], mask[:length, length:], mask[length:, :length], mask[length:, length:]
    assert not leak.any(), "clean never sees noisy"
    everything = torch.ones(length, length, dtype=torch.bool)
    if block == 1:
        assert torch.equal(noisy, torch.eye(length, dtype=torch.bool))
        assert torch.equal(before, everything.tril(-1)) and torch.equal(clean, everything.tril())
    if block == length:
        assert noisy.all() and clean.all() and not before.any()
    short = AttentionPattern("block_diffusion", length, block, last_clean=False)
    assert not mask[:length, short.rows :].any(), "no noisy row sees the clean rows of the last block"
    assert torch.equal(dense(short), mask[: short.rows, : short.rows]) and dense(short).sum() == length * length


@pytest.mark.parametrize("halves", ["all_rows", "scored_rows"])
@pytest.mark.parametrize(("tile", "shapes"), [(4, SHAPES), (16, SHAPES), (128, [*SHAPES[::9], *LONG])], ids=["4", "16", "128"])
def test_block_sparse_form_is_the_dense_mask_tile_by_tile(tile: int, shapes: list[tuple[int, int]], halves: str) -> None:
    """A tile is listed as full exactly when it lies inside the mask and all of it is visible, as partial when some of it is."""
    for pattern in patterns(shapes):
        check_block_sparse_form(pattern, tile, halves)


def check_block_sparse_form(pattern: AttentionPattern, tile: int, halves: str) -> None:
    query_rows = pattern.rows if halves == "all_rows" else pattern.scored_rows
    form = block_sparse_indices(pattern, query_rows, tile)
    mask = dense(pattern)[:query_rows].numpy()
    q_tiles, k_tiles = -(-query_rows // tile), -(-pattern.rows // tile)
    padded = np.zeros((q_tiles * tile, k_tiles * tile), bool)
    padded[:query_rows, : pattern.rows] = mask
    cut = padded.reshape(q_tiles, tile, k_tiles, tile)
    every, some = cut.all((1, 3)), cut.any((1, 3))
    for name, expected in (("kv", some & ~every), ("full_kv", every)):
        counts, indices = form[f"{name}_num_blocks"], form[f"{name}_indices"]
        assert counts.dtype == indices.dtype == np.int32 and indices.shape == (q_tiles, k_tiles)
        for row in range(q_tiles):
            assert sorted(indices[row]) == list(range(k_tiles)), "all indices are valid ones, listed or not"
            listed = indices[row, : counts[row]].tolist()
            assert listed == np.flatnonzero(expected[row]).tolist(), f"{pattern}: {name} of row of tiles {row}"


@pytest.mark.parametrize(("length", "block"), SHAPES)
def test_tile_form_is_the_dense_mask(length: int, block: int) -> None:
    """The CPU kernel's observation: inside a tile the mask of a short sequence, and the clean half of earlier tiles whole."""
    for half in ("block_causal", "causal"):
        pattern = AttentionPattern("block_diffusion", length, block, half)  # type: ignore[arg-type]
        for tile in (size for size in range(block, length + 1, block) if length % size == 0):
            inside = tile_mask(pattern, tile)
            assert torch.equal(inside, dense(replace(pattern, length=tile)))
            made = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
            for start in range(0, length, tile):
                rows = torch.cat([torch.arange(start, start + tile), length + torch.arange(start, start + tile)])
                made[rows[:, None], rows] = inside
                made[rows, length : length + start] = True
            assert torch.equal(made, dense(pattern))


def test_tile_is_the_nearest_that_fits() -> None:
    for length, block in [*SHAPES, *LONG]:
        fitting = [size for size in range(1, length + 1) if length % size == 0 and size % block == 0]
        for target in (1, 16, 100, 128):
            tile = tile_length(AttentionPattern("block_diffusion", length, block), target)
            assert tile in fitting and abs(tile - target) == min(abs(size - target) for size in fitting)


@pytest.mark.parametrize(("length", "block"), SHAPES)
def test_decoding_within_the_context_sees_what_training_saw(length: int, block: int) -> None:
    """A clean row by the clean half; a noisy row of block b by the clean blocks before it and its own noisy block."""
    trained, positions = dense(AttentionPattern("block_diffusion", length, block)), torch.arange(length)
    assert torch.equal(decoding_mask(positions, positions, block, length), trained[length:, length:])
    for start in range(0, length, block):
        own = torch.arange(start, start + block)
        cached = torch.arange(start)
        decoded = decoding_mask(own, torch.cat([cached, own]), block, length)
        assert torch.equal(decoded, torch.cat([trained[own][:, length : length + start], trained[own][:, own]], 1))


@pytest.mark.parametrize(("context", "block"), [(8, 1), (8, 4), (8, 8), (12, 3), (6, 2)])
def test_decoding_beyond_the_context_sees_the_blocks_that_end_the_context(context: int, block: int) -> None:
    positions = torch.arange(3 * context)
    mask = decoding_mask(positions, positions, block, context)
    for query in positions.tolist():
        end = (query // block + 1) * block
        expected = [key for key in positions.tolist() if end - context <= key < end]
        assert mask[query].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("kind", ["block_diffusion", "causal"])
@pytest.mark.parametrize(("length", "block"), [(12, 1), (12, 3), (16, 4), (30, 5), (16, 16)])
def test_segments_keep_documents_apart(kind: str, length: int, block: int) -> None:
    """Pair by pair: a document begins with the token that ended the one before, and with token 0."""
    block, draws = (block, 2) if kind == "block_diffusion" else (1, 1)
    pattern = AttentionPattern(kind, length, block, document_end=0, draws=draws)  # type: ignore[arg-type]
    tokens = np.random.default_rng(length + block).integers(0, 5, (20, length))
    segments = document_segments(tokens.copy(), pattern)
    assert segments.shape == (20, pattern.rows)
    for row, segment in zip(tokens, segments, strict=True):
        begins = [position for position in range(length) if position == 0 or row[position] == 0]
        document = [max(begin for begin in begins if begin <= position) for position in range(length)]

        def belongs(place: int, document: list[int] = document) -> int:
            if kind == "causal" or place >= pattern.scored_rows:
                return document[place % length]
            start = place % length // block * block
            return document[start - 1] if start else 0  # what goes on where the block begins: all that is known by then

        expected = [[belongs(query) == belongs(key) for key in range(pattern.rows)] for query in range(pattern.rows)]
        assert np.array_equal(segment[:, None] == segment[None, :], expected)
