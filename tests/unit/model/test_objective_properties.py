"""The network under the objective: properties 2, 3 and 4 of block diffusion, on tiny transformers in fp32.

The reference is a plain forward written here from the canonical parameter names alone: one stream, a boolean mask, no
tiles, no second half, logits everywhere.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.attention import kernels
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import BlockDiffusion, NetworkInputs, row_nelbo
from bd3_scale.recipe.schema import ModelConfig

pytestmark = pytest.mark.usefixtures("world_of_one")

VARIANTS = {
    "gpt": {"mlp_bias": True, "head_bias": True},
    "llama": {"norm": "rmsnorm", "mlp": "swiglu", "key_value_heads": 2, "tied_head": True},
    "adaln": {"conditioning": "adaln", "conditioning_size": 16},
}


def _network(vocabulary: int, context: int, variant: str = "gpt", kernel: str = "tiled", layers: int = 2) -> Transformer:
    """Data ids 0..vocabulary-1, MASK = vocabulary. Weights are large enough for every path to matter."""
    config = ModelConfig(context=context, layers=layers, hidden=32, heads=4, attention=kernel, **VARIANTS[variant])  # type: ignore[arg-type]
    model = Transformer(config, vocabulary + 1, vocabulary)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.normal_(centre, 0.2, generator=generator)
    return model


def _plain_logits(model: Transformer, tokens: Tensor, block_size: int, clean_half: str = "block_causal", noisy_from: int = 0) -> Tensor:
    """Logits [n, V] of one sequence int64 [n] in which block a sees blocks <= a (`causal`: positions before `noisy_from`
    see no later position)."""
    config, parameters = model.config, dict(model.named_parameters())
    position = torch.arange(len(tokens))
    visible = position[None] // block_size <= position[:, None] // block_size
    if clean_half == "causal":
        visible &= (position[None] <= position[:, None]) | (position[:, None] >= noisy_from)
    size, groups = config.head_size, config.heads // config.kv_heads
    rate = config.rotary_base ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones(len(tokens), size // 2), position[:, None] * rate)

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    def norm(x: Tensor, name: str) -> Tensor:
        x = x if config.norm == "rmsnorm" else x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * parameters[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))

    def modulation(name: str, count: int) -> list[Tensor]:
        if config.conditioning == "none":
            return [torch.tensor(float(i % 3 == 2)) for i in range(count)]  # shift 0, scale 0, gate 1
        waves = torch.cat([torch.ones(128), torch.zeros(128)])  # cos and sin of sigma = 0
        condition = F.silu(linear(F.silu(linear(waves, "condition.mlp.0")), "condition.mlp.2"))
        return list(linear(condition, name).chunk(count))

    x = parameters["embedding.weight"][tokens]
    for layer in range(config.layers):
        here = f"blocks.{layer}"
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(f"{here}.modulation", 6)
        y = norm(x, f"{here}.attention_norm") * (1 + scale) + shift
        q = rotate(linear(y, f"{here}.attention.query").unflatten(-1, (config.heads, size)).transpose(0, 1))
        k, v = linear(y, f"{here}.attention.key_value").unflatten(-1, (config.kv_heads, 2, size)).permute(2, 1, 0, 3)
        k, v = (rotate(k).repeat_interleave(groups, 0), v.repeat_interleave(groups, 0))
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(~visible, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + gate * linear(y, f"{here}.attention.output")
        y = linear(norm(x, f"{here}.mlp_norm") * (1 + mlp_scale) + mlp_shift, f"{here}.mlp.up")
        y = F.silu(y[..., ::2]) * y[..., 1::2] if config.mlp == "swiglu" else F.gelu(y, approximate="tanh")
        x = x + mlp_gate * linear(y, f"{here}.mlp.down")
    shift, scale = modulation("final_modulation", 2)
    head = parameters["embedding.weight" if config.tied_head else "head.weight"]
    logits = F.linear(norm(x, "final_norm") * (1 + scale) + shift, head, parameters.get("head.bias"))
    mask_id = len(head) - 1
    return logits.masked_fill(torch.arange(len(head)) == mask_id, -torch.inf)


def _one_pass_logits(model: Transformer, inputs: NetworkInputs) -> Tensor:
    """Logits [m, L, V] of the whole noisy half as the training forward makes them: what reaches the head, put through it."""
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    every = torch.arange(inputs.tokens.shape[0] * inputs.pattern.length)
    with torch.no_grad():
        model(replace(inputs, selected=every, targets=torch.zeros_like(every), weights=torch.ones(len(every))))
        hook.remove()
        return model.head(seen[0]).unflatten(0, (inputs.tokens.shape[0], -1))


def _rows(count: int, length: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocabulary, (count, length))


@pytest.fixture(params=[4, 128], ids=["small_tiles", "one_tile"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU kernel cuts a row into tiles; sequences here are short, so that its usual tile would hold all of one."""
    monkeypatch.setattr(kernels, "CPU_TILE", request.param)


SHAPES = [(12, 1), (16, 4), (24, 12), (9, 9), (16, 2)]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("clean_half", ["block_causal", "causal"])
@pytest.mark.parametrize(("length", "block_size"), SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_pass_is_a_plain_forward_for_each_block(length: int, block_size: int, variant: str, clean_half: str) -> None:
    """Property 2: logits and gradients equal those of separate forwards on [x_0^<b, x_t^b]."""
    objective = BlockDiffusion(5, length, block_size, (0.2, 1.0), clean_half)
    model = _network(5, length, variant)
    rows = _rows(2, length, 5)
    inputs = objective.training_inputs(rows, np.arange(2), 0, 0, 2)
    one_pass = _one_pass_logits(model, inputs)
    loss, nll = model(inputs)
    (loss / (2 * objective.scored_tokens_per_row)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    reference_nll: list[Tensor] = []
    noisy, clean = inputs.tokens[:, :length], torch.from_numpy(rows)
    for row, start in itertools.product(range(2), range(0, length, block_size)):
        block = slice(start, start + block_size)
        sequence = torch.cat([clean[row, :start], noisy[row, block]])
        logits = _plain_logits(model, sequence, block_size, clean_half, start)[start:]
        torch.testing.assert_close(one_pass[row, block], logits.detach(), rtol=0, atol=1e-5)
        masked = noisy[row, block] == 5
        reference_nll.append(F.cross_entropy(logits[masked], clean[row, block][masked], reduction="none"))
    reference = torch.cat(reference_nll)
    torch.testing.assert_close(nll, reference.detach(), rtol=0, atol=1e-5)
    ((reference * inputs.weights).sum() / (2 * objective.scored_tokens_per_row)).backward()
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        assert gradient is not None and parameter.grad is not None and gradient.any(), name
        difference = (gradient - parameter.grad).abs().max()
        assert difference < 1e-5, f"{name}: gradients differ by {difference}"


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kernel", ["tiled", "dense"])
@pytest.mark.parametrize(("length", "block_size"), SHAPES)
def test_no_leakage(length: int, block_size: int, kernel: str) -> None:
    """Property 3, bit for bit: what must not be seen changes nothing at all, and what must be seen changes something.

    Row i of the batch has its token i changed, in one half only.
    """
    objective = BlockDiffusion(5, length, block_size, (0.5, 0.5))
    model = _network(5, length, "llama", kernel, layers=3)
    inputs = objective.training_inputs(np.tile(_rows(1, length, 5), (length, 1)), np.arange(length), 0, 0, length)
    before = _one_pass_logits(model, inputs)
    block = torch.arange(length) // block_size
    for half, changes in (("clean", block[:, None] < block[None]), ("noisy", block[:, None] == block[None])):
        tokens = inputs.tokens.clone()
        there = torch.arange(length if half == "noisy" else objective.pattern.clean_rows)  # the last block's clean tokens do not exist
        place = (there, there + (length if half == "clean" else 0))
        tokens[place] = (tokens[place] + 1) % 5
        after = _one_pass_logits(model, replace(inputs, tokens=tokens))
        changed = (after != before).any(-1)
        assert torch.equal(changed, changes), f"{half} token of block b reaches noisy logits of the wrong blocks"


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("clean_half", ["block_causal", "causal"])
@pytest.mark.parametrize(("length", "block_size"), [(12, 1), (16, 4), (24, 12)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_clean_rows_of_the_last_block_are_not_missed(length: int, block_size: int, variant: str, clean_half: str) -> None:
    """Loss, nll and gradients are those of a clean half that is whole, as where the rest would be no multiple of `row_multiple`."""
    short, whole = (BlockDiffusion(5, length, block_size, (0.2, 1.0), clean_half, row_multiple=multiple) for multiple in (1, 7))
    assert (short.pattern.rows, whole.pattern.rows) == (2 * length - block_size, 2 * length)
    model, rows, found = _network(5, length, variant), _rows(2, length, 5), []
    for objective in (short, whole):
        loss, nll = model(objective.training_inputs(rows, np.arange(2), 0, 0, 2))
        loss.backward()
        found.append([loss.detach(), nll, *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_block_size_1_at_full_masking_is_an_autoregressive_likelihood() -> None:
    """Property 4: the loss is -log p of the chain rule, and that p sums to 1 over all sequences with the same token 0."""
    vocabulary, length = 3, 5
    objective = BlockDiffusion(vocabulary, length, 1, (1.0, 1.0))
    model = _network(vocabulary, length)
    rows = np.array([(2, *rest) for rest in itertools.product(range(vocabulary), repeat=length - 1)])
    inputs = objective.training_inputs(rows, np.arange(len(rows)), 0, 0, len(rows))
    with torch.no_grad():
        loss, nll = model(inputs)
        likelihoods = []
        for row in torch.from_numpy(rows):
            steps = [torch.cat([row[:i], torch.tensor([vocabulary])]) for i in range(1, length)]
            log_p = [_plain_logits(model, prefix, 1)[-1].log_softmax(-1)[row[i + 1]] for i, prefix in enumerate(steps)]
            likelihoods.append(-sum(value.item() for value in log_p))
    per_row = row_nelbo(inputs, nll) * (length - 1)
    np.testing.assert_allclose(per_row, likelihoods, rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(sum(likelihoods), rel=1e-6)
    assert np.exp(-per_row).sum() == pytest.approx(1.0, abs=1e-5)
    fixed = objective.validation_inputs(rows, np.arange(len(rows)), 0)
    assert all(torch.equal(getattr(fixed, name), getattr(inputs, name)) for name in ("tokens", "selected", "targets", "weights"))


def test_block_size_1_with_random_times_has_the_likelihood_as_its_mean() -> None:
    """Property 4: E over t ~ U[1e-3, 1] of the loss = the autoregressive -log p, and its variance is what t = 1 removes."""
    length, global_batch, steps = 8, 64, 30
    objective = BlockDiffusion(5, length, 1)
    model = _network(5, length)
    row = _rows(1, length, 5)
    with torch.no_grad():
        exact_inputs = replace(objective, interval=(1.0, 1.0)).training_inputs(row, np.arange(1), 0, 0, 1)
        exact = model(exact_inputs)[0].item() / (length - 1)
        means = []
        for step in range(steps):
            inputs = objective.training_inputs(np.tile(row, (global_batch, 1)), np.arange(global_batch), step, 0, global_batch)
            means.append(model(inputs)[0].item() / (global_batch * objective.scored_tokens_per_row))
    error = np.std(means, ddof=1) / np.sqrt(steps)
    assert abs(np.mean(means) - exact) < 4 * error and error < 0.05 * exact


@pytest.mark.parametrize("kernel", ["tiled", "dense"])
@pytest.mark.parametrize("clean_half", ["block_causal", "causal"])
def test_packed_documents_do_not_see_each_other_nor_where_they_end(kernel: str, clean_half: str) -> None:
    """`data.document_mask`: what stands before the last document's first block does not matter to the blocks after it; and a
    noisy block knows nothing of what it has to predict, the end of a document included."""
    context, size, end = 24, 4, 0
    network = _network(7, context, kernel=kernel)
    rows = np.random.default_rng(3).integers(1, 7, (1, context))
    rows[0, 11] = end  # the last token of block 2

    def nll(rows: np.ndarray, document_end: int | None) -> tuple[np.ndarray, np.ndarray]:
        objective = BlockDiffusion(7, context, size, (0.6, 0.9), clean_half, document_end=document_end)
        inputs = objective.training_inputs(rows, np.zeros(1, np.int64), 5, 1, 1)
        with torch.no_grad():
            return inputs.selected.numpy(), network(inputs)[1].numpy()

    other = rows.copy()
    other[0, 1:10] = 7 - rows[0, 1:10]
    places, ours = nll(rows, end)
    after = places >= 12
    assert after.sum() > 3 and np.array_equal(ours[after], nll(other, end)[1][after])
    assert np.abs(nll(rows, None)[1] - nll(other, None)[1])[after].max() > 1e-3, "without the mask they are seen"
    # Block 4 and what follows: other clean tokens, another place of an end; what is not masked stays.
    block = (places >= 16) & (places < 20)
    hidden = places[places >= 16]
    for ending in hidden[hidden < 19]:
        changed = rows.copy()
        changed[0, hidden] = 7 - rows[0, hidden]
        changed[0, ending] = end
        kept = [place for place in places[block] if place != ending][:1]
        changed[0, kept] = rows[0, kept]
        same = block & (changed[0, places] == rows[0, places])
        assert same.sum() >= 1 and np.array_equal(nll(changed, end)[1][same], ours[same])
