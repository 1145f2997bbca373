"""The shares of all context ranks together are the attention of the undivided row: outputs and gradients, on every kernel.

The ranks are played one after the other; that they exchange what they ask for is what the table of layouts shows.
"""

from __future__ import annotations

import itertools
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from bd3_scale.attention import context_keys, kernels
from bd3_scale.attention.context_keys import in_order
from bd3_scale.attention.kernels import attend, block_mask, document_block_mask
from bd3_scale.attention.mask import AttentionPattern, dense
from tests.unit.attention.test_kernels import TOLERANCE, documents, reference, tensors

PATTERNS = [
    AttentionPattern("block_diffusion", 32, 1),
    AttentionPattern("block_diffusion", 96, 4, draws=2),
    AttentionPattern("block_diffusion", 48, 6, "causal"),
    AttentionPattern("causal", 48, 1),
    AttentionPattern("full", 24, 24, draws=2),
    AttentionPattern("full", 20, 20),
]
KERNELS = ("tiled", "dense", "flex")


def named(pattern: AttentionPattern) -> str:
    return f"{pattern.kind}-{pattern.length}-{pattern.block_size}"


def everywhere(pattern: AttentionPattern) -> list[tuple[AttentionPattern, int]]:
    """(pattern, context ranks): where each rank has an early and a late piece, and where it has one block."""
    found = [(pattern, 2), (pattern, 4)]
    if pattern.kind == "block_diffusion":
        found.append((AttentionPattern("block_diffusion", 4 * pattern.block_size, pattern.block_size, pattern.clean_half), 4))
    return found


@pytest.mark.parametrize("target", [4, 16, 128])
@pytest.mark.parametrize("pattern", PATTERNS, ids=named)
def test_shares_are_the_undivided_attention(pattern: AttentionPattern, target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_TILE", target)
    for (whole, ranks), of_documents, scored in itertools.product(everywhere(pattern), (False, True), (False, True)):
        if of_documents and whole.kind == "full":
            continue
        segments = documents(whole, 3) if of_documents else None
        q, k, v, gradient = tensors(whole, 4, 2, 3, whole.scored_rows if scored else whole.rows, torch.float32)
        expected = reference(q, k, v, gradient, whole, segments)
        for name in KERNELS if target == 128 else ("tiled",):
            found = [torch.zeros_like(each) for each in (q, q, k, v)]
            for rank in range(ranks):
                share = whole.share(rank, ranks)
                rows = share.undivided_rows(torch.arange(share.scored_rows if scored else share.rows))
                keys = share.undivided_keys(torch.arange(share.key_rows))
                seen = None if segments is None else segments[:, keys]
                given = [t[index].requires_grad_(name != "flex") for t, index in ((q, rows), (k, keys), (v, keys))]
                out = attend(*given, share, name, seen)
                found[0][rows] = out.detach()
                if name != "flex":
                    of_q, *of_keys = torch.autograd.grad(out, given, gradient[rows])
                    found[1][rows] = of_q
                    for total, part in zip(found[2:], of_keys, strict=True):
                        total.index_add_(0, keys, part)
            for made, right, what in zip(found, expected, ("output", "q", "k", "v"), strict=True):
                if what == "output" or name != "flex":
                    message = f"{what} of {name}, {whole}, {ranks} ranks"
                    assert (made - right).abs().max() < TOLERANCE * max(1.0, float(right.abs().max())), message


# FlexAttention as it is, not compiled, takes a quarter of a second for each part: one pattern of a kind.
IN_A_RING = [("tiled", target, pattern) for target in (4, 128) for pattern in PATTERNS]
IN_A_RING += [("flex", 128, pattern) for pattern in (PATTERNS[1], PATTERNS[3], PATTERNS[5])]


@pytest.mark.parametrize(
    ("kernel", "target", "pattern"), IN_A_RING, ids=lambda value: named(value) if isinstance(value, AttentionPattern) else None
)
def test_a_ring_is_the_undivided_attention(kernel: str, target: int, pattern: AttentionPattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads here. Each is given its own rows alone, and the segments of all."""
    monkeypatch.setattr(kernels, "CPU_TILE", target)
    # Its dense form has a backward on CPU, too, and what torch says is that its kernel has none.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    turn = threading.Lock()  # of whoever computes: torch's tracing is of one thread at a time
    every_kind = itertools.product(everywhere(pattern), (False, True), (False, True))
    two_kinds = [((pattern, 4), False, False), ((pattern, 4), True, True)]
    for (whole, ranks), of_documents, scored in two_kinds if kernel == "flex" else every_kind:
        if of_documents and whole.kind == "full":
            continue
        segments = documents(whole, 3) if of_documents else None
        q, k, v, gradient = tensors(whole, 4, 2, 3, whole.scored_rows if scored else whole.rows, torch.float32)
        wires = [queue.Queue[torch.Tensor]() for _ in range(ranks)]

        def hop(x: torch.Tensor, share: AttentionPattern, wires: list[queue.Queue[torch.Tensor]] = wires) -> torch.Tensor:
            wires[share.context_rank].put(x.clone())
            turn.release()
            try:
                return wires[share.context_rank - 1].get(timeout=60)
            finally:
                turn.acquire()

        def attended(share: AttentionPattern, scored: bool, data: list[torch.Tensor | None]) -> list[torch.Tensor]:
            rows = share.undivided_rows(torch.arange(share.scored_rows if scored else share.rows))
            every = share.undivided_rows(torch.arange(share.rows))
            seen = None if data[4] is None else data[4][:, share.undivided_keys(torch.arange(share.key_rows))]
            given = [t[index].requires_grad_() for t, index in zip(data[:3], (rows, every, every), strict=True)]
            with turn:
                out = attend(*given, share, kernel, seen)
                return [rows, every, out.detach(), *torch.autograd.grad(out, given, data[3][rows])]

        monkeypatch.setattr(context_keys, "hop", hop)
        found = [torch.zeros_like(each) for each in (q, q, k, v)]
        with ThreadPoolExecutor(ranks) as pool:
            data = [q, k, v, gradient, segments]
            begun = [pool.submit(attended, whole.share(rank, ranks, ring=True), scored, data) for rank in range(ranks)]
            for rows, every, *made in (one.result() for one in begun):
                for total, part, index in zip(found, made, (rows, rows, every, every), strict=True):
                    total[index] = part
        expected = reference(q, k, v, gradient, whole, segments)
        for made, right, what in zip(found, expected, ("output", "q", "k", "v"), strict=True):
            assert (made - right).abs().max() < TOLERANCE * max(1.0, float(right.abs().max())), f"{what}, {whole}, {ranks} ranks"


@pytest.mark.parametrize("pattern", PATTERNS, ids=named)
def test_what_travels_is_put_in_the_order_of_positions(pattern: AttentionPattern) -> None:
    for whole, ranks in everywhere(pattern):
        shares = [whole.share(rank, ranks) for rank in range(ranks)]
        travelling = [share.undivided_rows(torch.arange(share.own_keys, share.rows)) for share in shares]
        for share in shares:
            wanted = share.undivided_keys(torch.arange(share.own_keys, share.key_rows))
            assert torch.equal(in_order(torch.cat(travelling), share), wanted)
            own = share.keys_of_rows(torch.arange(share.rows))
            assert torch.equal(share.undivided_keys(own), share.undivided_rows(torch.arange(share.rows)))


@pytest.mark.parametrize("pattern", [AttentionPattern("block_diffusion", 1024, 16), AttentionPattern("causal", 1024, 1)])
def test_flex_mask_of_a_share_covers_what_is_visible_and_no_more_tiles(pattern: AttentionPattern) -> None:
    share = pattern.share(1, 2)
    for query_rows in (share.rows, share.scored_rows):
        needed = dense(share)[:query_rows].unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)
        assert torch.equal(block_mask(share, query_rows, torch.device("cpu")).to_dense()[0, 0].bool(), needed)
        one_text = torch.zeros(1, share.key_rows, dtype=torch.int32)
        assert torch.equal(document_block_mask(share, query_rows, one_text).to_dense()[0, 0].bool(), needed)


@pytest.mark.parametrize("pattern", [AttentionPattern("block_diffusion", 1024, 16), AttentionPattern("causal", 1024, 1)])
def test_flex_masks_of_a_ring_are_the_parts_of_the_dense_one(pattern: AttentionPattern) -> None:
    """Of every step: the tiles that are visited, and what is seen in them; rows that see nothing are among them."""
    nothing = False
    for rank, step in itertools.product(range(2), range(2)):
        share = pattern.share(rank, 2, ring=True)
        keys = share.before(step).undivided_rows(share.met(step))
        for query_rows in (share.rows, share.scored_rows):
            seen = dense(pattern)[share.undivided_rows(torch.arange(query_rows))][:, keys]
            needed = seen.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)
            nothing |= not bool(seen.any(1).all())
            one_text = torch.zeros(1, share.key_rows, dtype=torch.int32)
            for mask in (block_mask(share, query_rows, torch.device("cpu"), step), document_block_mask(share, query_rows, one_text, step)):
                assert torch.equal(mask.to_dense()[0, 0].bool(), needed)
                zero = torch.tensor(0)
                assert torch.equal(mask.mask_mod(zero, zero, torch.arange(query_rows)[:, None], torch.arange(len(keys))), seen)
    assert nothing
