"""The next-token loss and masked diffusion under the network: what they mean, checked against other ways to compute it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.network_inputs import NetworkInputs, row_nelbo
from bd3_scale.objectives.table import Autoregressive, BlockDiffusion, MaskedDiffusion
from bd3_scale.recipe.schema import ModelConfig

pytestmark = pytest.mark.usefixtures("world_of_one")

VARIANTS: dict[str, dict] = {"gpt": {}, "llama": {"norm": "rmsnorm", "mlp": "swiglu", "key_value_heads": 2, "tied_head": True}}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def _network(vocabulary: int, context: int, variant: str) -> Transformer:
    """Data ids 0..vocabulary-1, MASK = vocabulary. Weights are large enough for every path to matter."""
    model = Transformer(ModelConfig(context=context, layers=2, hidden=32, heads=4, **VARIANTS[variant]), vocabulary + 1, vocabulary)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model


def _next_token_log_p(model: Transformer, prefix: Tensor) -> Tensor:
    """log p of the token after `prefix` int64 [n], float [V]: a forward that has never seen anything later."""
    count = len(prefix)
    causal = torch.ones(count, count).tril().bool()
    return model.decode(prefix[None], torch.arange(count), None, causal, last=1)[0, 0].log_softmax(-1)


@every_variant
def test_the_next_token_loss_is_that_of_forwards_on_prefixes(variant: str) -> None:
    length = 10
    model = _network(7, length, variant)
    rows = np.random.default_rng(0).integers(0, 7, (3, length))
    inputs = Autoregressive(7, length).training_inputs(rows, np.arange(3), 0, 0, 3)
    loss, nll = model(inputs)
    expected = [-_next_token_log_p(model, row[:i])[row[i]] for row in torch.from_numpy(rows) for i in range(1, length)]
    torch.testing.assert_close(nll, torch.stack(expected), rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(sum(value.item() for value in expected), rel=1e-6)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_its_nelbo_is_an_exact_likelihood() -> None:
    """exp of minus the row's NELBO sums to 1 over all rows with the same token 0."""
    vocabulary, length = 3, 5
    model = _network(vocabulary, length, "gpt")
    rows = np.array([(2, *rest) for rest in itertools.product(range(vocabulary), repeat=length - 1)])
    inputs = Autoregressive(vocabulary, length).validation_inputs(rows, np.arange(len(rows)), 0)
    with torch.no_grad():
        nelbo = row_nelbo(inputs, model(inputs)[1])
    assert np.exp(-nelbo * (length - 1)).sum() == pytest.approx(1.0, abs=1e-5)


def _logits_loss_and_gradients(model: Transformer, inputs: NetworkInputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    model.zero_grad()
    loss, _ = model(inputs)
    loss.backward()
    hook.remove()
    with torch.no_grad():
        logits = model.head(seen[0])
    return logits, loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@every_variant
def test_one_stream_is_two_of_which_the_clean_one_is_not_seen(variant: str) -> None:
    """L' = L: the same logits, loss and gradients as from [x_t ; x_0] under the mask of block diffusion, from half the rows."""
    length = 12
    model = _network(5, length, variant)
    rows = np.random.default_rng(1).integers(0, 5, (3, length))
    alone, block = (
        objective.training_inputs(rows, np.arange(3), 0, 0, 3)
        for objective in (MaskedDiffusion(5, length), BlockDiffusion(5, length, length))
    )
    assert torch.equal(alone.tokens, block.tokens) and alone.pattern == block.pattern
    twin = replace(
        alone,
        tokens=torch.cat([alone.tokens, torch.from_numpy(rows)], 1),
        positions=torch.cat([alone.positions] * 2),
        pattern=AttentionPattern("block_diffusion", length, length),
    )
    logits, loss, gradients = _logits_loss_and_gradients(model, alone)
    twin_logits, twin_loss, twin_gradients = _logits_loss_and_gradients(model, twin)
    assert 2 * alone.tokens.shape[1] == twin.tokens.shape[1] and len(logits) == len(alone.selected) > 10
    torch.testing.assert_close(logits, twin_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, twin_loss, rtol=1e-6, atol=0)
    assert len(gradients) == len(twin_gradients) == len(list(model.parameters()))
    for gradient, twin_gradient in zip(gradients, twin_gradients, strict=True):
        assert gradient.any() and (gradient - twin_gradient).abs().max() < 1e-5 * max(1.0, float(gradient.abs().max()))


@every_variant
def test_masked_diffusion_sees_the_whole_row(variant: str) -> None:
    """Every unmasked token reaches every logit, to its left and to its right."""
    length = 8
    model = _network(5, length, variant)
    inputs = MaskedDiffusion(5, length, (0.5, 0.5)).training_inputs(np.ones((1, length), np.int64), np.arange(1), 0, 0, 1)
    masked = (inputs.tokens[0] == 5).nonzero().ravel()
    before = _logits_loss_and_gradients(model, inputs)[0]
    for place in (inputs.tokens[0] != 5).nonzero().ravel().tolist():
        inputs.tokens[0, place] = 3
        after = _logits_loss_and_gradients(model, inputs)[0]
        inputs.tokens[0, place] = 1
        assert (after != before).any(-1).all()
    assert 0 < len(masked) < length and F.softmax(before, -1)[:, 5].eq(0).all()
