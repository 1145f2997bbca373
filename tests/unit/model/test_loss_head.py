"""The chunked head is cross-entropy, or score entropy, over all ids but MASK: values, gradients, and what is never made."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bd3_scale.costs import sizes
from bd3_scale.model.layers import TensorParallelFactory
from bd3_scale.model.loss_head import Head
from bd3_scale.recipe.schema import ModelConfig

pytestmark = pytest.mark.usefixtures("world_of_one")

HIDDEN, VOCABULARY, TOKENS = 12, 37, 200
BIASES = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
CHUNKS = pytest.mark.parametrize("chunk", [1, 70 * VOCABULARY, 1 << 24], ids=["chunks_of_64", "chunks_of_70", "one_chunk"])


def head(bias: bool, dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY, multiple: int = 1) -> Head:
    factory = TensorParallelFactory(dtype=dtype, vocabulary_multiple=multiple)
    made = Head(ModelConfig(hidden=HIDDEN, head_bias=bias), factory, vocabulary, vocabulary - 1, None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 1, generator=generator)
    return made


def batch(tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, targets (never MASK), weights (a third of them 0)."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    targets = torch.randint(0, vocabulary - 1, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator) * 5 * (torch.arange(tokens) % 3 > 0)
    return hidden.requires_grad_(), targets, weights


def reference(module: Head, hidden: Tensor, targets: Tensor, normalised: bool = True) -> tuple[Tensor, list[Tensor]]:
    """float64: nll [n] with F.cross_entropy over the columns before MASK (or the score entropy by its definition, in ratios),
    and the leaves its gradient goes to."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, *module.parameters())]
    logits = F.linear(leaves[0], leaves[1], leaves[2] if module.bias is not None else None)[:, : VOCABULARY - 1]
    if normalised:
        return F.cross_entropy(logits, targets, reduction="none"), leaves
    ratio = 0.3 / 0.7  # alpha / (1 - alpha) of any alpha: it divides out
    scores = ratio * logits.exp() / (VOCABULARY - 1)
    target = scores.gather(1, targets[:, None])[:, 0]
    return (scores.sum(1) - ratio * target.log() + ratio * (math.log(ratio) - 1)) / ratio, leaves


@BIASES
@CHUNKS
@pytest.mark.parametrize("multiple", [1, 16], ids=["plain", "padded"])
@pytest.mark.parametrize("normalised", [True, False], ids=["cross-entropy", "score entropy"])
def test_is_the_weighted_loss_without_mask(
    bias: bool, chunk: int, multiple: int, normalised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sizes.LOGITS_CHUNK, "cpu", chunk)
    module, (hidden, targets, weights) = head(bias, multiple=multiple), batch()
    if not normalised:  # exp of the logits is summed: those of a usual size
        hidden = (0.3 * hidden.detach()).requires_grad_()
    assert len(module.weight) == -(-VOCABULARY // multiple) * multiple
    total, nll = module(hidden, targets, weights, normalised)
    expected, leaves = reference(module, hidden, targets, normalised)
    assert total.dtype == nll.dtype == torch.float32 and total.shape == ()
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), (expected * weights).sum(), rtol=1e-6, atol=0)
    (total * 0.25).backward()
    ((expected * weights).sum() * 0.25).backward()
    for made, right in zip((hidden, *module.parameters()), leaves, strict=True):
        assert made.grad is not None and right.grad is not None
        assert (made.grad - right.grad).abs().max() < 1e-6 * right.grad.abs().max()
    assert not module.weight.grad[VOCABULARY - 1 :].any(), "MASK and padding have probability 0: nothing pulls at their rows"
    assert module.bias is None or not module.bias.grad[VOCABULARY - 1 :].any()


def test_score_entropy_is_cross_entropy_and_the_price_of_the_mass() -> None:
    """The difference is A - 1 - log A, nothing where the mean of exp(logits) over the words is 1."""
    module, (hidden, targets, weights) = head(bias=True), batch()
    with torch.no_grad():
        mass = module(hidden).double().exp().sum(-1) / (VOCABULARY - 1)
        entropy, nll = (module(hidden, targets, weights, normalised)[1].double() for normalised in (False, True))
        torch.testing.assert_close(entropy - nll, mass - 1 - mass.log(), rtol=1e-5, atol=1e-4)


@CHUNKS
def test_weight_0_is_exactly_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding: whatever stands there, the sum and the gradients are the same bits."""
    monkeypatch.setitem(sizes.LOGITS_CHUNK, "cpu", chunk)
    results = []
    for other in (False, True):
        module, (hidden, targets, weights) = head(bias=True), batch()
        padding = weights == 0
        if other:
            with torch.no_grad():
                hidden[padding] *= -100
                targets[padding] = 0
        total, _ = module(hidden, targets, weights)
        total.backward()
        assert hidden.grad is not None and not hidden.grad[padding].any() and hidden.grad[~padding].any(1).all()
        results.append([total, hidden.grad, *(parameter.grad for parameter in module.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@CHUNKS
def test_chunks_change_no_value(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, (hidden, targets, weights) = head(bias=True), batch()
    with torch.no_grad():
        single = torch.cat([module(hidden[i : i + 1], targets[i : i + 1], weights[i : i + 1])[1] for i in range(TOKENS)])
    monkeypatch.setitem(sizes.LOGITS_CHUNK, "cpu", chunk)
    torch.testing.assert_close(module(hidden, targets, weights)[1], single, rtol=1e-6, atol=1e-6)


def test_large_logits_stay_finite() -> None:
    module, (hidden, targets, weights) = head(bias=False), batch()
    with torch.no_grad():
        hidden *= 1e4
    total, nll = module(hidden, targets, weights)
    total.backward()
    expected, _ = reference(module, hidden, targets)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=0.1)
    assert hidden.grad is not None and hidden.grad.isfinite().all() and module.weight.grad.isfinite().all()


@BIASES
def test_bf16_sums_in_fp32(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of many chunks are added in fp32 and rounded once: the error does not grow with the number of chunks."""
    monkeypatch.setitem(sizes.LOGITS_CHUNK, "cpu", 1)
    module, (hidden, targets, weights) = head(bias, dtype=torch.bfloat16), batch(6400)
    hidden = hidden.detach().bfloat16().requires_grad_()
    total, nll = module(hidden, targets, weights)
    total.backward()
    expected, leaves = reference(module, hidden, targets)
    (expected * weights).sum().backward()
    assert total.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(total.double(), (expected * weights).sum(), rtol=1e-3, atol=0)
    for made, right in zip((hidden, *module.parameters()), leaves, strict=True):
        assert made.grad is not None and right.grad is not None and made.grad.dtype == torch.bfloat16
        assert (made.grad - right.grad).abs().max() < 2**-7 * right.grad.abs().max()


def test_gradients_of_bf16_are_scaled_in_fp32() -> None:
    """A scale that is rounded to bf16 first would be off by up to 0.2 %, for all of them alike."""
    scale, found = 1.003, []
    for factor in (1.0, scale):
        module, (hidden, targets, weights) = head(True, dtype=torch.bfloat16), batch()
        hidden = hidden.detach().bfloat16().requires_grad_()
        (module(hidden, targets, weights)[0] * factor).backward()
        assert hidden.grad is not None
        found.append(hidden.grad)
    assert torch.equal(found[1], (found[0].float() * scale).bfloat16()) and not torch.equal(*found)


@BIASES
def test_no_position_at_all_is_no_gradient(bias: bool) -> None:
    module, (hidden, targets, weights) = head(bias, dtype=torch.bfloat16), batch()
    none = hidden.detach().bfloat16()[:0].requires_grad_()
    total, nll = module(none, targets[:0], weights[:0])
    total.backward()
    assert total == 0 and not len(nll) and not any(parameter.grad.any() for parameter in module.parameters())


@BIASES
def test_without_targets_it_gives_logits_that_never_choose_mask(bias: bool) -> None:
    module, (hidden, targets, weights) = head(bias, dtype=torch.bfloat16, multiple=16), batch()
    with torch.no_grad():
        logits = module(hidden.bfloat16())
        assert logits.dtype == torch.float32 and logits.shape == (TOKENS, VOCABULARY)
        assert torch.isneginf(logits[:, module.impossible]).all() and logits[:, : module.impossible].isfinite().all()
        module = head(bias)
        nll = F.cross_entropy(module(hidden), targets, reduction="none")
        torch.testing.assert_close(nll, module(hidden, targets, weights)[1], rtol=1e-5, atol=1e-5)


def test_without_gradients_only_the_forward_runs() -> None:
    module, (hidden, targets, weights) = head(bias=True), batch()
    with_gradients = module(hidden, targets, weights)
    assert with_gradients[0].requires_grad and not with_gradients[1].requires_grad
    for frozen in (False, True):
        if frozen:
            module.requires_grad_(False)
            hidden = hidden.detach()
        with torch.set_grad_enabled(frozen), FlopCounterMode(display=False) as counter:
            result = module(hidden, targets, weights)
        assert counter.get_total_flops() == 2 * TOKENS * HIDDEN * VOCABULARY
        assert not result[0].requires_grad and not result[1].requires_grad
        assert all(torch.equal(one, two) for one, two in zip(result, with_gradients, strict=True))


def test_no_logits_of_all_positions_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many more positions than a chunk: no allocation, and no sum of what is alive, comes near (tokens, V) in any dtype."""
    tokens, vocabulary = 8192, 1000
    monkeypatch.setitem(sizes.LOGITS_CHUNK, "cpu", 64 * vocabulary)
    module, (hidden, targets, weights) = (
        head(bias=True, vocabulary=vocabulary),
        batch(tokens, vocabulary),
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module(hidden, targets, weights)[0].backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    alive = peak = 0
    for _, size in memory:
        alive += size
        peak = max(peak, alive)
    assert peak > 4 * tokens * HIDDEN, "the gradient of the hidden states, at least, is seen"
    assert max(size for _, size in memory) <= max(4 * 64 * vocabulary, 4 * tokens * HIDDEN)
    assert peak < tokens * vocabulary / 2, "less than half a byte for each of tokens x V"
