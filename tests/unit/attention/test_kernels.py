"""All kernels give the attention of the mask, to rounding: outputs and gradients, every shape of tile and group.

The reference is a softmax in float64 over the dense mask, with K and V repeated. FlexAttention has no backward on CPU, and
without a compiler it runs in a dense form: what its block-sparse indices say is tested with the mask.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bd3_scale.attention import kernels
from bd3_scale.attention.kernels import BACKENDS, KERNELS, attend, block_mask, document_block_mask
from bd3_scale.attention.mask import AttentionPattern, dense, document_segments, tile_length
from bd3_scale.attention.tiled import Tiles

SHAPES = [(2, 1), (13, 1), (13, 13), (12, 4), (30, 5), (35, 7), (48, 3), (64, 64), (72, 12)]
HEADS = [(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)]
"""(heads, kv heads)."""
HERE = tuple(name for name in KERNELS if BACKENDS.get(name) is None)
"""Kernels that run without CUDA: a backend of FlexAttention named by itself is refused there."""
SIZE = 8
TOLERANCE = 1e-5
"""Of fp32, in units of the largest value."""


def tensors(pattern: AttentionPattern, heads: int, kv_heads: int, batch: int, query_rows: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as the layer makes them (K and V are strided views of one tensor), and a gradient of the output."""
    generator = torch.Generator().manual_seed(pattern.rows + heads + kv_heads + batch)
    q = torch.randn(query_rows, batch, heads, SIZE, generator=generator, dtype=torch.float64)
    fused = torch.randn(pattern.rows, batch, kv_heads, 2, SIZE, generator=generator, dtype=torch.float64)
    gradient = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    k, v = (2 * fused).to(dtype).unbind(-2)
    return [q.to(dtype), k, v, gradient.to(dtype)]


def reference(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, pattern: AttentionPattern, segments: Tensor | None = None) -> list[Tensor]:
    """float64 [output, gradients of q, k, v]."""
    q, k, v = (t.double().detach().requires_grad_() for t in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k.repeat_interleave(groups, 2)) / SIZE**0.5
    mask = dense(pattern)[: q.shape[0]]
    if segments is not None:
        mask = (mask & (segments[:, : q.shape[0], None] == segments[:, None]))[:, None]
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    out = torch.einsum("bhqk,kbhd->qbhd", weights, v.repeat_interleave(groups, 2))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient.double())]


def by_kernel(
    name: str, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, pattern: AttentionPattern, segments: Tensor | None = None
) -> list[Tensor]:
    if name == "flex":
        with torch.no_grad():
            return [attend(q, k, v, pattern, name, segments)]
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = attend(q, k, v, pattern, name, segments)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient)]


def assert_attends(pattern: AttentionPattern, heads: int, kv_heads: int, batch: int, query_rows: int, names: tuple[str, ...]) -> None:
    inputs = tensors(pattern, heads, kv_heads, batch, query_rows, torch.float32)
    expected = reference(*inputs, pattern)
    for name in names:
        for made, right, what in zip(by_kernel(name, *inputs, pattern), expected, ("output", "q", "k", "v"), strict=False):
            message = f"{what} of {name}, {pattern}, heads {heads}/{kv_heads}, batch {batch}, {query_rows} query rows"
            assert made.shape == right.shape, message
            assert (made - right).abs().max() < TOLERANCE * max(1.0, float(right.abs().max())), message


@pytest.mark.parametrize("target", [1, 16, 128])
@pytest.mark.parametrize("clean_half", ["block_causal", "causal"])
@pytest.mark.parametrize(("length", "block"), SHAPES)
def test_tiled_form_is_exact_forward_and_backward(
    length: int, block: int, clean_half: str, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles of one block (where the halves are kept apart), of several, and of the whole row."""
    monkeypatch.setattr(kernels, "CPU_TILE", target)
    for last_clean in (True, False)[: 2 if block < length else 1]:
        pattern = AttentionPattern("block_diffusion", length, block, clean_half, last_clean=last_clean)  # type: ignore[arg-type]
        for (heads, kv_heads), batch in zip(HEADS, (1, 2, 1, 2, 2), strict=True):
            for query_rows in (pattern.rows, pattern.scored_rows):
                assert_attends(pattern, heads, kv_heads, batch, query_rows, ("tiled",))


def test_both_ways_to_arrange_a_tile_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    arranged = set()
    for target in (1, 16, 128):
        for length, block in SHAPES:
            pattern = AttentionPattern("block_diffusion", length, block)
            q, k, *_ = tensors(pattern, 1, 1, 1, pattern.rows, torch.float32)
            tiles = Tiles(q, k, pattern, tile_length(pattern, target), None)
            arranged.add((tiles.apart, tiles.tiles > 1))
    assert arranged == {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.parametrize("target", [4, 64])
@pytest.mark.parametrize("draws", [2, 3])
def test_several_draws_attend_as_the_mask_says(draws: int, target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_TILE", target)
    for (length, block), clean_half, last_clean in itertools.product(
        [(12, 4), (24, 1), (66, 11)], ["block_causal", "causal"], [True, False]
    ):
        pattern = AttentionPattern("block_diffusion", length, block, clean_half, last_clean=last_clean, draws=draws)  # type: ignore[arg-type]
        for query_rows in (pattern.rows, pattern.scored_rows):
            assert_attends(pattern, 4, 2, 2, query_rows, HERE)
    alone = AttentionPattern("full", 12, 12, draws=draws)
    assert_attends(alone, 4, 2, 2, alone.rows, HERE)


@pytest.mark.parametrize("clean_half", ["block_causal", "causal"])
@pytest.mark.parametrize(("length", "block"), [(13, 1), (35, 7), (64, 64), (130, 13)])
def test_dense_and_flex_attend_as_the_mask_says(length: int, block: int, clean_half: str) -> None:
    """(130, 13): Flex has tiles of 128, one of them over both halves."""
    for last_clean in (True, False)[: 2 if block < length else 1]:
        pattern = AttentionPattern("block_diffusion", length, block, clean_half, last_clean=last_clean)  # type: ignore[arg-type]
        assert_attends(pattern, 4, 2, 2, pattern.rows, ("dense", "flex"))
        assert_attends(pattern, 3, 3, 1, pattern.scored_rows, ("dense", "flex"))


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_other_patterns_on_every_kernel(kind: str) -> None:
    for heads, kv_heads in HEADS:
        pattern = AttentionPattern(kind, 19, 1)  # type: ignore[arg-type]
        inputs = tensors(pattern, heads, kv_heads, 2, 19, torch.float32)
        expected = reference(*inputs, pattern)
        for name in HERE:
            for made, right in zip(by_kernel(name, *inputs, pattern), expected, strict=False):
                assert (made - right).abs().max() < TOLERANCE * max(1.0, float(right.abs().max())), f"{name} {kind}"


@pytest.mark.parametrize(("length", "block"), [(13, 1), (48, 3), (72, 12)])
def test_bf16_loses_no_more_than_its_rounding(length: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the largest value, errors stay at a few units of 2^-8."""
    monkeypatch.setattr(kernels, "CPU_TILE", 12)
    pattern = AttentionPattern("block_diffusion", length, block)
    inputs = tensors(pattern, 4, 2, 2, pattern.rows, torch.bfloat16)
    for made, right in zip(by_kernel("tiled", *inputs, pattern), reference(*inputs, pattern), strict=True):
        assert made.dtype == torch.bfloat16
        assert (made.double() - right).abs().max() < 2**-6 * right.abs().max()


def test_flex_mask_covers_what_is_visible_and_no_more_tiles() -> None:
    pattern = AttentionPattern("block_diffusion", 320, 16)
    for query_rows in (pattern.rows, pattern.scored_rows):
        mask = block_mask(pattern, query_rows, torch.device("cpu"))
        padded = torch.zeros(-(-query_rows // 128) * 128, 640, dtype=torch.bool)
        padded[:query_rows] = dense(pattern)[:query_rows]
        needed = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)
        assert torch.equal(mask.to_dense()[0, 0].bool(), needed)
        assert mask is block_mask(pattern, query_rows, torch.device("cpu")), "made once per pattern"


def documents(pattern: AttentionPattern, batch: int) -> Tensor:
    """Segments of rows in which documents end at random; the last row is one text."""
    tokens = np.random.default_rng(pattern.length + pattern.block_size).random((batch, pattern.length)) > 0.2
    tokens[-1] = True
    return torch.from_numpy(document_segments(tokens.astype(np.int64), replace(pattern, document_end=0)))


@pytest.mark.parametrize("target", [1, 16, 128])
@pytest.mark.parametrize("clean_half", ["block_causal", "causal"])
@pytest.mark.parametrize(("length", "block"), [(13, 1), (12, 4), (35, 7), (64, 64), (72, 12), (130, 13)])
def test_documents_are_kept_apart_by_every_kernel(
    length: int, block: int, clean_half: str, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "CPU_TILE", target)
    whole, draws = clean_half == "causal" or block == length, 2 if target == 16 else 1
    pattern = AttentionPattern("block_diffusion", length, block, clean_half, last_clean=whole, draws=draws)  # type: ignore[arg-type]
    for (heads, kv_heads), query_rows in itertools.product([(1, 1), (4, 2)], [pattern.rows, pattern.scored_rows]):
        inputs, segments = tensors(pattern, heads, kv_heads, 3, query_rows, torch.float32), documents(pattern, 3)
        expected = reference(*inputs, pattern, segments)
        for name in HERE if target == 128 else ("tiled",):
            for made, right in zip(by_kernel(name, *inputs, pattern, segments), expected, strict=False):
                assert (made - right).abs().max() < TOLERANCE * max(1.0, float(right.abs().max())), name


@pytest.mark.parametrize("name", HERE)
def test_documents_are_kept_apart_in_causal_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_TILE", 16)
    pattern = AttentionPattern("causal", 50, 1)
    inputs, segments = tensors(pattern, 4, 2, 3, 50, torch.float32), documents(pattern, 3)
    for made, right in zip(by_kernel(name, *inputs, pattern, segments), reference(*inputs, pattern, segments), strict=False):
        assert (made - right).abs().max() < TOLERANCE * max(1.0, float(right.abs().max()))


def test_flex_visits_only_tiles_in_which_documents_meet() -> None:
    pattern = AttentionPattern("block_diffusion", 384, 16)
    tokens = np.ones((2, 384), np.int64)
    tokens[0, 128] = 0
    segments = torch.from_numpy(document_segments(tokens, replace(pattern, document_end=0)))
    for query_rows in (pattern.rows, pattern.scored_rows):
        mask = document_block_mask(pattern, query_rows, segments)
        padded = torch.zeros(2, query_rows, 768, dtype=torch.bool)
        padded[:, :query_rows] = dense(pattern)[:query_rows] & (segments[:, :query_rows, None] == segments[:, None])
        needed = padded.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).any(4).any(2)
        visited = mask.to_dense()[:, 0].bool()
        assert not (needed & ~visited).any()
        assert visited[0].sum() < visited[1].sum(), "tiles between two documents are left out"


def test_kernel_is_the_one_named_or_the_one_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in KERNELS:
        monkeypatch.setitem(KERNELS, name, lambda q, k, v, pattern, segments, name=name: asked.append(name) or q)
    q = torch.zeros(2, 1, 1, SIZE)
    for name in ("auto", *KERNELS):
        attend(q, q, q, AttentionPattern("block_diffusion", 1, 1), name)
    assert asked == ["tiled", *KERNELS]


@pytest.mark.parametrize("block", [4, 64])
def test_nothing_quadratic_is_allocated(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest single allocation of forward and backward, inside the kernels too, is linear in L at a fixed tile."""
    monkeypatch.setattr(kernels, "CPU_TILE", 64)

    def largest(name: str, length: int) -> int:
        pattern = AttentionPattern("block_diffusion", length, block)
        inputs = tensors(pattern, 2, 1, 1, pattern.rows, torch.float32)
        kernels._dense_mask.cache_clear()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            by_kernel(name, *inputs, pattern)
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        return max(event["args"]["Bytes"] for event in events if event["name"] == "[memory]")

    sizes = {length: largest("tiled", length) for length in (512, 1024, 2048)}
    assert sizes[1024] <= 2 * sizes[512] and sizes[2048] <= 2 * sizes[1024]
    assert sizes[2048] < 2048 * 2048, "not even one byte for each of L x L"
    assert largest("dense", 512) >= (2 * 512) ** 2, "the dense form is seen to be what it is"
