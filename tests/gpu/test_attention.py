"""FlexAttention as it is compiled for the GPU against a softmax in float64 over the dense mask: outputs and gradients.

Some cases cover every value of head size, length (one no multiple of the tile of 128), block size, grouped queries, documents, scored
half alone, context ranks and precision; each is a kernel of its own to compile, forwards and backwards, which is what the time goes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bd3_scale.attention import flex_ring, tiled
from bd3_scale.attention.kernels import attend
from bd3_scale.attention.mask import AttentionPattern, dense, document_segments
from tests.gpu.device import DEVICE, KERNEL, REHEARSAL, needs_gpu

pytestmark = needs_gpu

BATCH = 2
END = 0
"""The token that ends a document."""
LARGEST = {torch.bfloat16: 2**-6, torch.float32: 2e-5}
"""The largest error, in units of the largest value: a few roundings of bf16, whose unit is 2^-8; fp32 is not TF32."""
NO_WORSE = 5.0 if REHEARSAL else 2.0
"""Times the root-mean-square error of dense attention in the same precision. (The CPU's kernel adds up parts in bf16.)"""
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    head_size: int
    length: int
    block_size: int
    heads: tuple[int, int] = (4, 4)
    """Of queries, of keys and values."""
    documents: bool = False
    scored: bool = False
    """Whether only the scored half asks, as in the last layer."""
    dtype: torch.dtype = BF16
    last_clean: bool = True
    kind: str = "block_diffusion"
    draws: int = 1
    rank: int | None = None
    """Which of four context ranks; None: there is one."""
    ring: bool = False
    """Whether it meets the keys of the others one rank at a time."""

    def __str__(self) -> str:
        words = [f"d{self.head_size}", f"L{self.length}", f"block{self.block_size}", f"heads{self.heads[0]}over{self.heads[1]}"]
        words += [name for name in ("documents", "scored") if getattr(self, name)]
        words += ["fp32"] * (self.dtype == FP32) + ["cut"] * (not self.last_clean) + [self.kind] * (self.kind != "block_diffusion")
        words += [] if self.rank is None else [f"rank{self.rank}of4"] + ["ring"] * self.ring
        return "-".join(words + [f"{self.draws}draws"] * (self.draws > 1))

    @property
    def pattern(self) -> AttentionPattern:
        return self.undivided if self.rank is None else self.undivided.share(self.rank, 4)

    @property
    def undivided(self) -> AttentionPattern:
        end = END if self.documents else None
        return AttentionPattern(self.kind, self.length, self.block_size, document_end=end, last_clean=self.last_clean, draws=self.draws)  # type: ignore[arg-type]


CASES = [
    Case(64, 1024, 16),
    Case(64, 1024, 16, scored=True),
    Case(128, 1024, 16, heads=(4, 2)),
    Case(128, 1024, 1),
    Case(64, 1024, 4, heads=(4, 1), scored=True),
    Case(128, 1024, 1024, scored=True),
    Case(64, 1040, 16, last_clean=False),
    Case(128, 1040, 4, heads=(4, 2), documents=True),
    Case(64, 1040, 1, documents=True, scored=True),
    Case(64, 1040, 1040, heads=(4, 2)),
    Case(64, 1024, 1, documents=True, kind="causal"),
    Case(64, 1040, 16, heads=(4, 2), dtype=FP32),
    Case(128, 1024, 4, documents=True, scored=True, dtype=FP32),
    Case(64, 1024, 16, draws=2),
    Case(128, 1040, 4, heads=(4, 2), documents=True, last_clean=False, draws=4),
    Case(64, 2048, 16, rank=1),
    Case(128, 2080, 4, heads=(4, 2), documents=True, scored=True, rank=2),
    Case(64, 2048, 1, heads=(4, 2), kind="causal", rank=3),
    Case(64, 2048, 16, rank=1, ring=True),
    Case(128, 2080, 4, heads=(4, 2), documents=True, scored=True, rank=2, ring=True),
    Case(64, 2048, 1, heads=(4, 2), kind="causal", rank=3, ring=True),
    Case(64, 2048, 2048, kind="full", rank=0, ring=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flex_is_dense_attention(case: Case, record_property: Callable[[str, object], None]) -> None:
    """Forwards and backwards, and without anything of the size of the scores, which is what is held where Flex falls back in silence."""
    pattern = case.pattern
    inputs, segments = tensors(case), None
    if case.documents:
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(0, 300, (BATCH, case.length), generator=generator)  # a document ends after 300 tokens
        asked = pattern.undivided_keys(torch.arange(pattern.key_rows))
        segments = torch.from_numpy(document_segments(tokens.numpy(), case.undivided))[:, asked].to(DEVICE)
        assert segments.max() > 0
    expected = reference(*inputs, pattern, segments)
    run = in_a_ring if case.ring else by
    flex = run(KERNEL, inputs, pattern, segments)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # one yardstick for all: others lack masks or head sizes
        plain = by("dense", inputs, pattern, segments, repeated=True)
    seen = []
    for made, other, right, what in zip(flex, plain, expected, ("output", "q", "k", "v"), strict=True):
        assert made.dtype == case.dtype and made.shape == right.shape
        error, others = made.double() - right, other.double() - right
        largest = float(error.abs().max() / right.abs().max())
        mine, dense_form = (float(e.square().mean().sqrt() / right.square().mean().sqrt()) for e in (error, others))
        seen.append((what, largest, mine, dense_form))
    record_property("table", f"{case!s:44s}" + "".join(f"  {what} {mine:.1e} ({form:.1e})" for what, _, mine, form in seen))
    for what, largest, mine, dense_form in seen:
        assert largest < LARGEST[case.dtype], f"{what}: {largest:.2e} of the largest value"
        assert mine < NO_WORSE * dense_form + 1e-6, f"{what}: root-mean-square error {mine:.2e}, that of dense attention {dense_form:.2e}"
    if not REHEARSAL:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(KERNEL, inputs, pattern, segments)
        grown, scores = torch.cuda.max_memory_allocated() - before, BATCH * case.heads[0] * inputs[0].shape[0] * pattern.key_rows * 4
        assert grown < scores, f"{grown / 2**20:.0f} MiB; scores would be {scores / 2**20:.0f}"
    elif not case.ring:
        with torch.no_grad():  # Flex as it is, not compiled: what its masks say
            right, made = expected[0], attend(*inputs[:3], pattern, "flex", segments)
        assert float((made.double() - right).abs().max() / right.abs().max()) < LARGEST[case.dtype]


def tensors(case: Case) -> list[Tensor]:
    """q, k, v as the layer makes them (k and v are strided views of one tensor), and a gradient of the output."""
    pattern, generator = case.pattern, torch.Generator().manual_seed(case.length + case.block_size)
    query_rows = pattern.scored_rows if case.scored else pattern.rows
    q, gradient = (torch.randn(query_rows, BATCH, case.heads[0], case.head_size, generator=generator) for _ in range(2))
    k, v = torch.randn(pattern.key_rows, BATCH, case.heads[1], 2, case.head_size, generator=generator).to(DEVICE, case.dtype).unbind(-2)
    return [q.to(DEVICE, case.dtype), k, v, gradient.to(DEVICE, case.dtype)]


def reference(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, pattern: AttentionPattern, segments: Tensor | None) -> list[Tensor]:
    """float64 [output, gradients of q, k, v]."""
    q, k, v = (t.double().detach().requires_grad_() for t in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k.repeat_interleave(groups, 2)) / q.shape[-1] ** 0.5
    mask = dense(pattern, DEVICE)[: q.shape[0]]
    if segments is not None:
        own = pattern.keys_of_rows(torch.arange(q.shape[0], device=DEVICE))
        mask = (mask & (segments[:, own, None] == segments[:, None]))[:, None]
    out = torch.einsum("bhqk,kbhd->qbhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v.repeat_interleave(groups, 2))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient.double())]


def by(kernel: str, inputs: list[Tensor], pattern: AttentionPattern, segments: Tensor | None, repeated: bool = False) -> list[Tensor]:
    """[output, gradients of q, k, v]. `repeated`: with K and V repeated for the query heads that share them."""
    q, k, v = (t.detach().requires_grad_() for t in inputs[:3])
    groups = q.shape[2] // k.shape[2] if repeated else 1
    out = attend(q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2), pattern, kernel, segments)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


def in_a_ring(kernel: str, inputs: list[Tensor], pattern: AttentionPattern, segments: Tensor | None) -> list[Tensor]:
    """As `by`, of a share that holds its own keys; what would travel is at hand here, and what is added to it is counted in."""
    share, (q, k, v, gradient) = replace(pattern, ring=True), inputs
    places = [share.before(step).keys_of_rows(share.met(step, q.device)) for step in range(share.context_ranks)]
    others = [torch.zeros_like(t, dtype=torch.float32) for t in (k, v)]

    def travelling(own_k: Tensor, own_v: Tensor, share: AttentionPattern) -> Iterator[tuple[int, Tensor, Tensor]]:
        for step in range(1, share.context_ranks):
            yield step, *(t.detach()[places[step]].permute(1, 2, 0, 3) for t in (k, v))

    def with_gradients(own_k: Tensor, own_v: Tensor, grad_k: Tensor, grad_v: Tensor, share: AttentionPattern) -> Iterator[tuple[Any, ...]]:
        for step, other_k, other_v in travelling(own_k, own_v, share):
            grads = [torch.zeros_like(t, dtype=torch.float32) for t in (other_k, other_v)]
            yield step, other_k, other_v, *grads
            for total, part in zip(others, grads, strict=True):
                total[places[step]] = part.permute(2, 0, 1, 3)

    with pytest.MonkeyPatch.context() as patch:
        for module in (flex_ring, tiled):
            patch.setattr(module, "travelling", travelling)
            patch.setattr(module, "travelling_with_gradients", with_gradients)
        given = [t.detach().requires_grad_() for t in (q, k[places[0]], v[places[0]])]
        out = attend(*given, share, kernel, segments)
        of_q, *own = torch.autograd.grad(out, given, gradient)
    for total, part in zip(others, own, strict=True):
        total[places[0]] += part
    return [out.detach(), of_q, *(total.to(k.dtype) for total in others)]
