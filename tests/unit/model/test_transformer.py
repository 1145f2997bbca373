"""The network as a whole: decoding against a cache is the training forward, and options mean what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern, decoding_mask
from bd3_scale.compiling import wrap_blocks
from bd3_scale.engines.initialise import initialise
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import Autoregressive, BlockDiffusion, NetworkInputs
from bd3_scale.recipe.schema import ModelConfig

pytestmark = pytest.mark.usefixtures("world_of_one")

VOCABULARY, MASK, LENGTH = 19, 18, 24
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt": {"mlp_bias": True, "head_bias": True},
    "llama": {"norm": "rmsnorm", "mlp": "swiglu", "key_value_heads": 2, "tied_head": True},
    "adaln": {"conditioning": "adaln", "conditioning_size": 16},
    "gpt2": {"positions": "learned", "attention_bias": "all", "norm_bias": True, "mlp_bias": True, "tied_head": True},
    "qwen3": {"norm": "rmsnorm", "norm_epsilon": 1e-6, "mlp": "swiglu", "key_value_heads": 2, "head_width": 12, "query_key_norm": True,
              "attention_bias": "query_key_value"},
    "olmo2": {"norm": "rmsnorm", "mlp": "swiglu", "key_value_heads": 2, "query_key_norm": True, "query_key_norm_width": "heads",
              "norm_place": "after"},
    "gemma3": {"norm": "rmsnorm", "mlp": "geglu", "key_value_heads": 2, "query_key_norm": True, "norm_place": "both",
               "rotary_local": [500.0, 2], "tied_head": True},
}  # fmt: skip


def network(variant: str = "gpt", std: float = 0.2, **options: Any) -> Transformer:
    """Every parameter drawn, so that every path matters."""
    config = ModelConfig(**{"context": LENGTH, "layers": 3, "hidden": 32, "heads": 4, **VARIANTS[variant], **options})
    model = Transformer(config, VOCABULARY, MASK)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, std, generator=generator)
    return model


def data(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, MASK, (rows, LENGTH))


def inputs(block_size: int = 4, rows: int = 2, interval: tuple[float, float] = (0.3, 0.9)) -> NetworkInputs:
    return BlockDiffusion(MASK, LENGTH, block_size, interval).training_inputs(data(rows), np.arange(rows), 0, 0, rows)


def trained_logits(model: Transformer, given: NetworkInputs) -> Tensor:
    """[m, L, V]: what the training forward gives the head, put through it, for every scored row."""
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    every = torch.arange(given.tokens.shape[0] * LENGTH)
    with torch.no_grad():
        model(replace(given, selected=every, targets=torch.zeros_like(every), weights=torch.ones(len(every))))
        hook.remove()
        return model.head(seen[0]).unflatten(0, (-1, LENGTH))


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


# -- Decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 4, 12, LENGTH])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_each_block_is_the_training_forward(variant: str, block_size: int) -> None:
    """With the cache of the clean blocks before it, and without a cache, under the decoding mask."""
    model, given = network(variant), inputs(block_size)
    expected = trained_logits(model, given)
    noisy, clean = given.tokens[:, :LENGTH], torch.from_numpy(data())
    cache = model.new_cache(2, LENGTH)
    for start in range(0, LENGTH, block_size):
        block = torch.arange(start, start + block_size)
        cached = model.decode(noisy[:, block], block, cache, None, last=block_size)
        torch.testing.assert_close(cached, expected[:, block], rtol=0, atol=2e-5)
        assert cache.length == start, "looking changes nothing"
        positions = torch.arange(start + block_size)
        plain = model.decode(
            torch.cat([clean[:, :start], noisy[:, block]], 1),
            positions,
            None,
            decoding_mask(positions, positions, block_size, LENGTH),
            last=block_size,
        )
        torch.testing.assert_close(plain, expected[:, block], rtol=0, atol=2e-5)
        assert model.decode(clean[:, block], block, cache, None, commit=True).shape == (2, 0, 0), "the head does not run"
        assert torch.equal(cache.positions, positions)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_token_by_token_is_the_causal_forward(variant: str) -> None:
    model = network(variant)
    others = np.random.default_rng(2).integers(0, MASK, (2, LENGTH))
    given = Autoregressive(MASK, LENGTH).training_inputs(others, np.arange(2), 0, 0, 2)
    expected, cache = trained_logits(model, given), model.new_cache(2, LENGTH)
    for i in range(LENGTH):
        logits = model.decode(given.tokens[:, i : i + 1], torch.tensor([i]), cache, None, commit=True, last=1)
        torch.testing.assert_close(logits[:, 0], expected[:, i], rtol=0, atol=2e-5)


def test_rows_that_were_dropped_are_as_if_masked() -> None:
    """In the first layer; deeper ones keep what the dropped rows told the others. So: a network of one layer."""
    model = network("llama", layers=1)
    tokens, positions = torch.from_numpy(data()), torch.arange(LENGTH)
    cache = model.new_cache(2, LENGTH)
    model.decode(tokens[:, :16], positions[:16], cache, None, commit=True)
    cache.drop(8)
    assert cache.positions.tolist() == list(range(8, 16))
    dropped = model.decode(tokens[:, 16:20], positions[16:20], cache, None, last=4)
    masked = model.decode(tokens[:, :20], positions[:20], None, (positions[:20] >= 8).expand(20, 20), last=4)
    torch.testing.assert_close(dropped, masked, rtol=0, atol=2e-5)
    model.decode(tokens[:, 16:], positions[16:], cache, None, commit=True)
    assert cache.positions.tolist() == list(range(8, LENGTH))
    cache.drop(cache.length)
    assert cache.length == 0


def test_only_relative_positions_matter() -> None:
    model, given = network(), inputs()
    moved = replace(given, positions=given.positions + 1000)
    torch.testing.assert_close(trained_logits(model, moved), trained_logits(model, given), rtol=0, atol=2e-4)


def test_learned_positions_are_what_tells_equal_tokens_apart() -> None:
    """Swapping two position vectors is swapping the two positions; without them, full attention cannot tell rows apart."""
    model, given = network("gpt2"), inputs(block_size=LENGTH)
    order = torch.arange(LENGTH)
    order[[3, 8]] = order[[8, 3]]
    expected = trained_logits(model, replace(given, positions=order.repeat(2)))
    with torch.no_grad():
        model.get_parameter("positions.weight").copy_(model.get_parameter("positions.weight")[order])
    torch.testing.assert_close(trained_logits(model, given), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        model.get_parameter("positions.weight").zero_()
    same = replace(given, tokens=torch.full_like(given.tokens, 5))
    logits = trained_logits(model, same)[..., :MASK]
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits), rtol=0, atol=1e-5)


def test_norm_of_heads_makes_scale_of_query_and_key_meaningless() -> None:
    model, given = network("qwen3", norm_epsilon=1e-12, attention_bias="none"), inputs()
    expected = trained_logits(model, given)
    with torch.no_grad():
        for block in model.blocks.values():
            block.attention.query.weight.mul_(3)  # type: ignore[union-attr, operator]
            block.attention.key_value.weight.unflatten(0, (2, 2, -1))[:, 0].mul_(0.5)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(trained_logits(model, given), expected, rtol=0, atol=1e-4)


def test_last_rows_and_misuse_of_the_cache() -> None:
    model, tokens, positions = network(), torch.from_numpy(data()), torch.arange(LENGTH)
    whole = model.decode(tokens, positions, None, None, last=LENGTH)
    assert whole.dtype == torch.float32 and whole.shape == (2, LENGTH, VOCABULARY) and torch.isneginf(whole[..., MASK]).all()
    torch.testing.assert_close(model.decode(tokens, positions, None, None, last=3), whole[:, -3:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="commit needs a cache"):
        model.decode(tokens, positions, None, None, commit=True)
    cache = model.new_cache(2, LENGTH - 1)
    with pytest.raises(ValueError, match="drop the oldest"):
        model.decode(tokens, positions, cache, None, commit=True)
    assert cache.length == 0


# -- Options -----------------------------------------------------------------------------------------------------------


def test_fresh_adaln_blocks_are_the_identity() -> None:
    """As in DiT: modulations start at 0, gates with them; what reaches the head is the normed embedding."""
    model, given = network("adaln"), inputs()
    initialise(model, model.config, seed=0)
    embedded = model.embedding(given.tokens[:, :LENGTH]).transpose(0, 1)
    torch.testing.assert_close(trained_logits(model, given), model.head(model.final_norm(embedded).flatten(0, 1)).unflatten(0, (2, LENGTH)))
    model(given)[0].backward()
    assert all(model.get_parameter(f"blocks.{i}.modulation.{part}").grad.any() for i in range(3) for part in ("weight", "bias")), (
        "they leave 0 with the first step"
    )


def test_open_gates_are_the_network_without_conditioning() -> None:
    """Of the six chunks (shift, scale, gate of attention, then of the MLP) the gates at 1, the others at 0."""
    conditioned, plain = network("adaln"), network("gpt", mlp_bias=False, head_bias=False)
    with torch.no_grad():
        for name, parameter in conditioned.named_parameters():
            if "modulation" in name:
                parameter.zero_()
                if name.startswith("blocks") and name.endswith("bias"):
                    parameter.unflatten(0, (6, -1))[[2, 5]] = 1
            elif not name.startswith("condition."):
                plain.get_parameter(name).copy_(parameter)
    torch.testing.assert_close(trained_logits(conditioned, inputs()), trained_logits(plain, inputs()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", range(6))
def test_each_modulation_acts_where_it_should(chunk: int) -> None:
    """A shift, scale or gate set per channel is the same as changing the plain block it stands for."""
    conditioned, twin = network("adaln", layers=1), network("adaln", layers=1)
    value = torch.linspace(0.5, 1.5, 32)
    with torch.no_grad():
        for model in (conditioned, twin):
            modulation = model.get_submodule("blocks.0.modulation")
            modulation.weight.zero_()
            modulation.bias.zero_().unflatten(0, (6, -1))[[2, 5]] = 1
        conditioned.get_parameter("blocks.0.modulation.bias").unflatten(0, (6, -1))[chunk] = value
        norm, rows = ("attention_norm", "attention.output") if chunk < 3 else ("mlp_norm", "mlp.down")
        if chunk % 3 == 0:
            twin.get_submodule(f"blocks.0.{norm}").register_forward_hook(lambda module, arguments, out: out + value)
        elif chunk % 3 == 1:
            twin.get_parameter(f"blocks.0.{norm}.weight").mul_(1 + value)
        else:
            twin.get_parameter(f"blocks.0.{rows}.weight").mul_(value[:, None])
    torch.testing.assert_close(trained_logits(conditioned, inputs()), trained_logits(twin, inputs()), rtol=0, atol=1e-5)


def test_tied_head_is_the_embedding_and_learns_from_both_ends() -> None:
    tied, untied = network("gpt", tied_head=True), network("gpt")
    assert tied.head.weight is tied.embedding.weight
    names = dict(tied.named_parameters())
    assert "head.weight" not in names and "head.bias" in names
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            parameter.copy_(names.get(name, tied.embedding.weight))
    losses = [model(inputs())[0] for model in (tied, untied)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1])
    shared, apart = gradients(tied), gradients(untied)
    assert apart["embedding.weight"].any() and apart["head.weight"].any()
    torch.testing.assert_close(shared["embedding.weight"], apart["embedding.weight"] + apart["head.weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_is_the_sum_of_its_rows_with_dropout_too(variant: str) -> None:
    model, given = network(variant, dropout=0.2), inputs(rows=4)
    total, nll = model(given)
    total.backward()
    whole = gradients(model)
    row_of = given.selected // LENGTH
    parts = []
    for row in range(4):
        mine = row_of == row
        part, part_nll = model(
            replace(
                given,
                tokens=given.tokens[row : row + 1],
                selected=given.selected[mine] - row * LENGTH,
                targets=given.targets[mine],
                weights=given.weights[mine],
                dropout_keys=given.dropout_keys[row : row + 1],
            )
        )
        part.backward()
        parts.append(part.item())
        torch.testing.assert_close(part_nll, nll[mine], rtol=0, atol=2e-5)
    assert total.item() == pytest.approx(sum(parts), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-4, msg=name)
    dropped, kept = total.item(), model.eval()(given)[0].item()
    assert abs(dropped - kept) > 1e-3 * abs(kept)


@pytest.mark.parametrize("part", ["attention", "mlp", "layer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_layers_give_the_same_bits(variant: str, part: str) -> None:
    """Dropout is keyed: a second forward inside backward needs no generator, and a forward keeps no state."""
    results = []
    for recompute in ("none", part):
        model = network(variant, dropout=0.2)
        wrap_blocks(model.blocks.values(), recompute=recompute, compile="none")
        for _ in range(2):
            total, _ = model(inputs())
            total.backward()
            results.append({"loss": total.detach(), **gradients(model)})
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


def test_kernels_are_interchangeable_in_the_network() -> None:
    expected = trained_logits(network("llama", attention="dense"), inputs())
    for kernel in ("auto", "tiled", "flex"):
        torch.testing.assert_close(trained_logits(network("llama", attention=kernel), inputs()), expected, rtol=0, atol=2e-5)


def test_full_pattern_is_block_diffusion_of_one_block() -> None:
    """Masked diffusion needs no clean half: nothing sees it."""
    model, given = network(), inputs(block_size=LENGTH)
    single = replace(
        given, tokens=given.tokens[:, :LENGTH], positions=given.positions[:LENGTH], pattern=AttentionPattern("full", LENGTH, LENGTH)
    )
    torch.testing.assert_close(trained_logits(model, single), trained_logits(model, given), rtol=0, atol=2e-5)
