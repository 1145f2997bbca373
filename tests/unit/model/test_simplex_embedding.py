"""SSD-LM in the network: the expected embedding against the dense one, who sees what, and that decoding is the training forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bd3_scale.attention.mask import decoding_mask
from bd3_scale.costs.flops import count_flops
from bd3_scale.distributed.sequence_shards import Stream
from bd3_scale.keyed_random import normals
from bd3_scale.model import simplex_embedding as module
from bd3_scale.model.layers import RowGroups
from bd3_scale.model.simplex_embedding import expected_embedding
from bd3_scale.model.transformer import Transformer, _of_groups
from bd3_scale.objectives.simplex import K, SimplexNoise, conditioning_times, remaining_signal
from bd3_scale.objectives.table import NetworkInputs, SimplexDiffusion
from bd3_scale.recipe.schema import ModelConfig

pytestmark = pytest.mark.usefixtures("world_of_one")

WORDS, HIDDEN, LENGTH, SIZE = 13, 6, 12, 3
TOKENS = torch.randint(0, WORDS, (4, 5), generator=torch.Generator().manual_seed(0))
TIMES = np.linspace(0, 1, 20).reshape(4, 5)
NOISE = SimplexNoise.at(np.random.default_rng(0).integers(-(2**62), 2**62, (4, 5)), TIMES)


def embedding(rows: int = WORDS) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()


def dense(weight: Tensor) -> Tensor:
    """softmax(x_t) E by the definition, [n, hidden]; every position's vector of logits at once."""
    x0 = 2 * K * torch.nn.functional.one_hot(TOKENS.flatten(), WORDS) - K
    keys, signal, spread = NOISE.flat()
    return (signal[:, None] * x0 + spread[:, None] * K * normals(keys, 0, WORDS)).softmax(-1) @ weight


# -- The expected embedding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3 * WORDS, 1 << 20])
def test_values_and_gradient_are_those_of_the_dense_product(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows behind the words (MASK, padding), whose gradient is exactly 0."""
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", chunk)
    weight = embedding(WORDS + 3)
    leaf = weight.detach()[:WORDS].clone().requires_grad_()
    expected = dense(leaf)
    found, total = expected_embedding(weight, TOKENS, NOISE, 0, WORDS)
    torch.testing.assert_close(found, expected)
    assert not total.requires_grad and (total > 0).all()
    coefficients = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(2))
    (expected * coefficients).sum().backward()
    (found * coefficients).sum().backward()
    assert weight.grad is not None and leaf.grad is not None
    torch.testing.assert_close(weight.grad[:WORDS], leaf.grad)
    assert not weight.grad[WORDS:].any()


def test_a_divided_vocabulary_gives_the_same() -> None:
    """Each part's mean, weighted by its share of the mass; one part has no word at all."""
    weight = embedding()
    parts = [expected_embedding(weight[first:last] if last > first else weight[:2], TOKENS, NOISE, first, last)
             for first, last in ((0, 4), (4, 11), (11, WORDS), (16, WORDS))]  # fmt: skip
    whole = sum(total for _, total in parts)
    torch.testing.assert_close(sum(mean * (total / whole)[:, None] for mean, total in parts), dense(weight))
    empty, mass = parts[-1]
    assert empty.requires_grad and not empty.any() and not mass.any()


def test_low_precision_weights_have_means_of_their_type() -> None:
    weight = embedding()
    low = weight.detach().bfloat16().requires_grad_()
    found, _ = expected_embedding(low, TOKENS, NOISE, 0, WORDS)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), dense(weight), rtol=0.03, atol=0.03)
    found.sum().backward()
    dense(weight).sum().backward()
    assert low.grad is not None and low.grad.dtype == torch.bfloat16 and weight.grad is not None
    torch.testing.assert_close(low.grad.float(), weight.grad, rtol=0.03, atol=0.03)


def test_without_noise_it_is_the_embedding_and_with_nothing_else_it_forgets_the_word() -> None:
    weight = embedding().detach()
    keys = NOISE.keys.numpy()
    distances = []
    for time in (0.3, 0.1, 0.01, 0.0):
        found, _ = expected_embedding(weight, TOKENS, SimplexNoise.at(keys, np.full((4, 5), time)), 0, WORDS)
        distances.append(float((found - weight[TOKENS.flatten()]).abs().max()))
    assert distances[-1] < 3e-3 and distances[-2] < 5e-3, "e^-2K of each other word is left"
    end = SimplexNoise.at(keys, np.ones((4, 5)))
    torch.testing.assert_close(*(expected_embedding(weight, tokens, end, 0, WORDS)[0] for tokens in (TOKENS, TOKENS.roll(1))))


def test_nothing_of_all_positions_and_words_is_kept_and_its_products_are_counted() -> None:
    weight, kept = embedding(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        expected_embedding(weight, TOKENS, NOISE, 0, WORDS)
    assert sum(kept) == 5 * TOKENS.numel()
    count = count_flops(
        ModelConfig(context=20, hidden=HIDDEN, heads=1), SimplexDiffusion(WORDS, 20, 5).pattern, WORDS + 1, 1.0, simplex=True
    )
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: lambda out, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
    ) as counter:
        expected_embedding(weight, TOKENS, NOISE, 0, WORDS)
    assert counter.get_total_flops() == count.embedding
    assert count.model == 3 * (count.layers + count.head) + 2 * count.embedding


# -- The network -------------------------------------------------------------------------------------------------------


def network(**variant: Any) -> Transformer:
    """Weights large enough for every path to matter, the time above all."""
    config = ModelConfig(context=LENGTH, layers=2, hidden=16, heads=2, conditioning="adaln", conditioning_size=8, **variant)
    made = Transformer(config, WORDS + 1, WORDS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return made.eval()


def data(count: int = 2) -> np.ndarray:
    return np.random.default_rng(5).integers(0, WORDS, (count, LENGTH))


def inputs(count: int = 2, size: int = SIZE) -> NetworkInputs:
    return SimplexDiffusion(WORDS, LENGTH, size).training_inputs(data(count), np.arange(count), 0, 0, count)


@torch.no_grad()
def logits(model: Transformer, given: NetworkInputs) -> Tensor:
    """[m, L, V] of every noisy row."""
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    every = torch.arange(given.tokens.shape[0] * LENGTH)
    model(replace(given, selected=every, targets=torch.zeros_like(every), weights=torch.ones(len(every))))
    hook.remove()
    return model.head(seen[0]).unflatten(0, (-1, LENGTH))


def changed(given: NetworkInputs, **simplex: Tensor) -> NetworkInputs:
    assert given.simplex is not None
    return replace(given, simplex=replace(given.simplex, **simplex))


def test_a_block_sees_its_noised_words_the_clean_ones_before_it_and_its_time() -> None:
    """Which blocks of noisy rows answer otherwise when one thing of block 1 (of 0 to 3) is changed."""
    model, given = network(), inputs()
    assert given.simplex is not None and given.noise_levels is not None
    # In the middle of its schedule, so that both noise and words matter.
    half = remaining_signal(np.full((2, LENGTH), 0.4))
    given = changed(given, signal=torch.from_numpy(np.sqrt(half)).float(), spread=torch.from_numpy(np.sqrt(1 - half)).float())
    before = logits(model, given)
    place = SIZE + 1

    def differs(other: NetworkInputs) -> list[bool]:
        moved = (logits(model, other) - before)[..., :WORDS].abs().amax(-1)[0]
        assert torch.equal(logits(model, other)[1], before[1]), "another row"
        return (moved.view(-1, SIZE).amax(1) > 1e-6).tolist()

    noisy, clean, keys, levels = given.tokens.clone(), given.tokens.clone(), given.simplex.keys.clone(), given.noise_levels.clone()  # type: ignore[union-attr]
    noisy[0, place] = (noisy[0, place] + 1) % WORDS
    clean[0, LENGTH + place] = (clean[0, LENGTH + place] + 1) % WORDS
    keys[0, place] += 1
    levels[0, 1] += 100.0
    assert differs(replace(given, tokens=noisy)) == [False, True, False, False]
    assert differs(replace(given, tokens=clean)) == [False, False, True, True]
    assert differs(changed(given, keys=keys)) == [False, True, False, False]
    assert differs(replace(given, noise_levels=levels)) == [False, True, False, False]


@pytest.mark.parametrize("size", [1, 3, LENGTH])
@pytest.mark.parametrize("variant", [{}, {"positions": "learned", "tied_head": True}], ids=["rotary", "learned"])
def test_decoding_each_block_is_the_training_forward(variant: dict[str, Any], size: int) -> None:
    """With the cache of the clean blocks before it, and without, under the decoding mask."""
    model, given = network(**variant), inputs(size=size)
    assert given.simplex is not None and given.noise_levels is not None
    expected = logits(model, given)
    noisy, clean = given.tokens[:, :LENGTH], torch.from_numpy(data())
    cache = model.new_cache(2, LENGTH)
    for number, start in enumerate(range(0, LENGTH, size)):
        block = torch.arange(start, start + size)
        here = given.simplex.moved(lambda part, block=block: part[:, block])
        level = given.noise_levels[:, number : number + 1]
        cached = model.decode(noisy[:, block], block, cache, None, last=size, noise_levels=level.expand(-1, size), simplex=here)
        torch.testing.assert_close(cached, expected[:, block], rtol=0, atol=3e-5)
        positions = torch.arange(start + size)
        plain = model.decode(
            torch.cat([clean[:, :start], noisy[:, block]], 1),
            positions,
            None,
            decoding_mask(positions, positions, size, LENGTH),
            last=size,
            noise_levels=torch.cat([conditioning_times(np.zeros((2, start))), level.expand(-1, size)], 1),
            simplex=here,
        )
        torch.testing.assert_close(plain, expected[:, block], rtol=0, atol=3e-5)
        model.decode(clean[:, block], block, cache, None, commit=True)


def test_gradients_are_those_of_rows_conditioned_one_by_one() -> None:
    """Groups of rows against the plain definition; where a rank's border cuts blocks, groups are the parts."""
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(5, 2, 4, generator=generator)
    x, y = torch.randn(2, 24, 2, 4, generator=generator)
    pattern = SimplexDiffusion(WORDS, LENGTH, SIZE).pattern
    whole = torch.cat([condition[:4].repeat_interleave(SIZE, 0), condition[4:].expand(LENGTH, 2, 4)])
    for ranks, size in ((1, 3), (2, 3), (3, 1), (4, 3)):
        for rank in range(ranks):
            stream = Stream(pattern, ranks, rank)
            mine, groups = _of_groups(condition, stream)
            assert groups == RowGroups(LENGTH // ranks, size)
            rows = stream.row_ids(torch.device("cpu"))
            for held in (rows, rows[: stream.scored]):
                found = groups.apply(torch.addcmul, (x[held], y[held]), (mine,))
                torch.testing.assert_close(found, torch.addcmul(x[held], y[held], whole[held]), msg=f"{rank} of {ranks}")


def test_micro_batches_make_one_batch() -> None:
    """The sum and its gradient over two rows equal those of each row alone, in training mode with dropout."""
    model = network(dropout=0.2).train()
    data = np.random.default_rng(5).integers(0, WORDS, (2, LENGTH))
    objective = SimplexDiffusion(WORDS, LENGTH, SIZE)
    found = []
    for split in ([[0, 1]], [[0], [1]]):
        model.zero_grad()
        losses = [model(objective.training_inputs(data[slots], np.array(slots), 4, 0, 2))[0] for slots in split]
        sum(losses).backward()
        found.append((float(sum(losses).detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert len(found[0][1]) == len(list(model.parameters()))
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
