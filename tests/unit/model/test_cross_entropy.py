"""The compiled cross-entropy is the other one: values, gradients in the logits' place, a divided vocabulary, any number of positions."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from bd3_scale.costs import sizes
from bd3_scale.model import loss_head
from bd3_scale.model.layers import TensorParallelFactory
from bd3_scale.model.loss_head import FusedCrossEntropy, Head
from bd3_scale.recipe.schema import ModelConfig

pytestmark = pytest.mark.usefixtures("world_of_one")

HIDDEN, VOCABULARY, PADDED = 12, 37, 48
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on CPU")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "_compiled", lambda function, backend: function)


def logits_of(tokens: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, -inf at MASK and padding; targets; weights, a third of them 0."""
    generator = torch.Generator().manual_seed(tokens)
    logits = (scale * torch.randn(tokens, PADDED, generator=generator)).to(dtype)
    logits[:, VOCABULARY - 1 :] = float("-inf")
    targets = torch.randint(0, VOCABULARY - 1, (tokens,), generator=generator)
    return logits, targets, 5 * torch.rand(tokens, generator=generator) * (torch.arange(tokens) % 3 > 0)


def reference(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """float64: nll [n] and the gradient of the weighted sum."""
    leaf = logits.double().requires_grad_()
    nll = F.cross_entropy(leaf, targets, reduction="none")
    (gradient,) = torch.autograd.grad(nll, leaf, weights.double())
    return nll.detach(), gradient


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_is_the_cross_entropy_and_its_gradient(dtype: torch.dtype, scale: float) -> None:
    logits, targets, weights = logits_of(50, dtype, scale)
    right, gradient = reference(logits, targets, weights)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert torch.equal(
        FusedCrossEntropy(0, False)(logits, targets, None)[0], FusedCrossEntropy(0, False)(logits.clone(), targets, weights)[0]
    )
    nll, made = FusedCrossEntropy(0, False)(logits, targets, weights)
    assert made is logits and nll.dtype == torch.float32, "no second tensor of as many numbers"
    torch.testing.assert_close(nll.double(), right, rtol=1e-5, atol=1e-5)
    assert (made.double() - gradient).abs().max() <= rounding * gradient.abs().max()
    assert not made[weights == 0].any() and not made[:, VOCABULARY - 1 :].any()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_divided_vocabulary_is_the_whole_one(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are the ranks; of four, the last holds padding alone."""
    logits, targets, weights = logits_of(50, torch.float32)
    share, meeting = PADDED // ranks, threading.Barrier(ranks, timeout=60)
    lying: dict[int, Tensor] = {}

    def all_reduce(tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None) -> None:
        lying[threading.get_ident()] = tensor.clone()
        meeting.wait()
        stacked = torch.stack(list(lying.values()))
        found = stacked.amax(0) if op == torch.distributed.ReduceOp.MAX else stacked.sum(0)
        meeting.wait()
        tensor.copy_(found)

    monkeypatch.setattr(loss_head.dist, "all_reduce", all_reduce)
    answers: list[tuple[Tensor, Tensor | None]] = [(torch.empty(0), None)] * ranks

    def run(rank: int) -> None:
        part = logits[:, rank * share : (rank + 1) * share].clone()
        answers[rank] = FusedCrossEntropy(rank * share, True)(part, targets, weights)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    right, gradient = reference(logits, targets, weights)
    for nll, _ in answers:
        torch.testing.assert_close(nll.double(), right, rtol=1e-5, atol=1e-5)
    made = torch.cat([part for _, part in answers if part is not None], 1)
    torch.testing.assert_close(made.double(), gradient, rtol=1e-5, atol=1e-6)


def step(kind: str, backend: str, dtype: torch.dtype, tokens: int) -> list[Tensor]:
    """Loss, nll and gradients of a head, chunk by chunk."""
    made = Head(
        ModelConfig(hidden=HIDDEN, head_bias=True, head_loss=kind), TensorParallelFactory(dtype=dtype, vocabulary_multiple=16), 37, 36, None
    )
    made.fused = FusedCrossEntropy(0, False, backend)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 1, generator=generator)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    _, targets, weights = logits_of(tokens, dtype)
    total, nll = made(hidden, targets, weights)
    total.backward()
    gradients = [hidden.grad, *(parameter.grad for parameter in made.parameters())]
    return [total.detach(), nll, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_head_that_is_fused_is_the_head(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64, and a shorter last one of many sizes: one graph of each function."""
    monkeypatch.setitem(sizes.LOGITS_CHUNK, "cpu", 1)
    counters.clear()
    loss_head._compiled.cache_clear()
    torch._dynamo.reset()
    for tokens in (200, 131, 64, 90):
        for plain, fused in zip(step("eager", backend, dtype, tokens), step("fused", backend, dtype, tokens), strict=True):
            # bf16: gradients are rounded in another order.
            bound = 2**-6 if dtype == torch.bfloat16 and plain.dtype == dtype else 1e-5
            assert plain.dtype == fused.dtype and (plain - fused).abs().max() <= bound * plain.abs().max()
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@needs_compiler
def test_it_moves_eight_bytes_for_a_logit_at_most(caplog: pytest.LogCaptureFixture) -> None:
    """By Inductor's own count of what its kernels read and write; megatron-core's form moves more than fifty."""
    from torch._inductor import config, metrics

    tokens, vocabulary = 64, 4096
    logits, place = torch.randn(tokens, vocabulary).bfloat16(), torch.randint(0, vocabulary, (tokens,))
    numbers = torch.rand(tokens)
    counted: list[Callable[..., Any]] = [loss_head.statistics, loss_head.put_gradient]
    torch._logging.set_logs(inductor_metrics=True)
    try:
        metrics.reset()
        with config.patch(force_disable_caches=True):
            for function, arguments in zip(counted, [(logits, place), (logits, place, numbers, numbers, numbers)], strict=True):
                torch.compile(function, fullgraph=True)(*arguments)
    finally:
        torch._logging.set_logs()
    assert 4 < metrics.num_bytes_accessed / logits.numel() < 8.1
