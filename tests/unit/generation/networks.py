"""Networks that sampling is tested on, and how their texts are counted.

The real one, tiny, in fp32; and a table, whose conditionals are exact rationals of small integers, so that the distribution of
whole texts is known and nothing is rounded differently on two ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd3_scale.generation.sampler import Result, generate
from bd3_scale.generation.token_sampling import SamplingOptions
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import BlockDiffusion, Objective
from bd3_scale.recipe.schema import ModelConfig

WORDS = 11
"""Ids of text in the tests on the transformer; the last one ends a text, MASK is the id after it."""
BOUND_1E4 = 3.719
"""Standard normal quantile of the level 1e-4 at which the chi-square tests judge."""


class TableCache:
    """What a network would keep as keys and values, here the tokens themselves."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.tokens = torch.zeros(batch, 0, dtype=torch.int64)
        self.positions = torch.zeros(0, dtype=torch.int64)
        self.capacity = capacity

    @property
    def length(self) -> int:
        return len(self.positions)

    def append(self, tokens: Tensor, positions: Tensor) -> None:
        assert self.length + len(positions) <= self.capacity, "more rows than were asked for"
        self.tokens = torch.cat([self.tokens, tokens], 1)
        self.positions = torch.cat([self.positions, positions])

    def drop(self, count: int) -> None:
        self.tokens, self.positions = self.tokens[:, count:], self.positions[count:]


class Table:
    """A network whose logits are a function of what each row sees: `rule(query, positions [m], tokens [b, m]) -> logits [b, V]`.

    `calls` counts. `held` is the most rows that a cache ever had. `told` is the noise of every call that tells it.
    """

    def __init__(self, rule: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        self.rule, self.calls, self.held = rule, 0, 0
        self.told: list[np.ndarray] = []

    def new_cache(self, batch: int, capacity: int) -> TableCache:
        return TableCache(batch, capacity)

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: Any,
        mask: Tensor | None,
        commit: bool = False,
        last: int = 0,
        noise_levels: Tensor | None = None,
    ) -> Tensor:
        self.calls += 1
        if noise_levels is not None:
            self.told.append(noise_levels.double().numpy())
        seen, where = tokens, positions
        if cache is not None:
            seen, where = torch.cat([cache.tokens, tokens], 1), torch.cat([cache.positions, positions])
        assert len(set(where.tolist())) == len(where), "a position is read twice"
        if mask is not None:
            assert mask.shape == (len(positions), len(where))
        logits = []
        for query in range(len(positions) - last, len(positions)):
            visible = torch.ones(len(where), dtype=torch.bool) if mask is None else mask[query]
            logits.append(self.rule(int(positions[query]), where[visible], seen[:, visible]))
        if commit:
            cache.append(tokens, positions)
            self.held = max(self.held, cache.length)
        return torch.stack(logits, 1) if logits else torch.zeros(len(tokens), 0, 0)


def scrambled(query: int, positions: Tensor, tokens: Tensor) -> Tensor:
    """Logits of V = WORDS + 1 that depend on every visible (position, token) pair; integers, so that nothing is rounded."""
    mixed = ((tokens + 3) * (positions + 7) * 2654435761 % 1000003).sum(1)
    ids = torch.arange(WORDS + 1)
    logits = ((mixed[:, None] * (ids + 1) + query * 97) % 101 / 25).float()
    logits[:, WORDS] = -torch.inf
    return logits


def tabular(probability: np.ndarray) -> Callable[[int, Tensor, Tensor], Tensor]:
    """The exact conditionals of a distribution over the tokens 1, 2, ... (position 0 is BOS): float64 [V0, V0, ...], MASK = V0."""
    size, table = probability.shape[0], torch.from_numpy(probability)

    def rule(query: int, positions: Tensor, tokens: Tensor) -> Tensor:
        logits = torch.full((len(tokens), size + 1), -torch.inf)
        place = {int(position) - 1: column for column, position in enumerate(positions) if position > 0}
        if query == 0 or query - 1 >= probability.ndim:
            logits[:, 0] = 0.0  # BOS, and what lies beyond the table
            return logits
        known = [tokens[:, place[axis]].tolist() if axis in place else [size] * len(tokens) for axis in range(probability.ndim)]
        answers: dict[tuple[int, ...], Tensor] = {}
        for row, context in enumerate(zip(*known, strict=True)):
            if context not in answers:
                chosen = table[tuple(slice(None) if token == size or axis == query - 1 else token for axis, token in enumerate(context))]
                left = [axis for axis, token in enumerate(context) if token == size or axis == query - 1]
                others = tuple(index for index, axis in enumerate(left) if axis != query - 1)
                answers[context] = (chosen.sum(others) if others else chosen).log().float()
            logits[row, :size] = answers[context]
        return logits

    return rule


def transformer(context: int, **variant: Any) -> Transformer:
    """A tiny network of the project's own, weights large enough for every path to matter."""
    config = ModelConfig(context=context, layers=2, hidden=16, heads=2, **variant)
    network = Transformer(config, WORDS + 1, WORDS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return network


class Counted:
    """A network seen through a hook that counts its calls."""

    def __init__(self, network: Any) -> None:
        self.network, self.calls, self.new_cache = network, 0, network.new_cache

    def decode(self, *arguments: Any, **options: Any) -> Tensor:
        self.calls += 1
        return self.network.decode(*arguments, **options)


def blocks_of(block_size: int, context: int, clean_half: str = "block_causal", words: int = WORDS) -> BlockDiffusion:
    return BlockDiffusion(words, context, block_size, clean_half=clean_half)


def given(prompts: list[list[int]], length: int, begin: int = WORDS - 1) -> tuple[np.ndarray, np.ndarray]:
    tokens, known = np.zeros((len(prompts), length), np.int64), np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt) + 1], known[row, : len(prompt) + 1] = [begin, *prompt], True
    return tokens, known


def sample(
    network: Any,
    objective: Objective,
    prompts: list[list[int]],
    length: int,
    *,
    words: int = WORDS,
    stop: bool = False,
    first_row: int = 0,
    seed: int = 0,
    use_cache: bool = True,
    **options: Any,
) -> Result:
    """`words` ids of text: the last begins a text and, with `stop`, ends it."""
    return generate(
        network,
        objective,
        *given(prompts, length, words - 1),
        SamplingOptions(**options),
        mask_id=words,
        end_of_text=words - 1 if stop else None,
        seed=seed,
        first_row=first_row,
        use_cache=use_cache,
    )


def assert_same(one: Result, other: Result) -> None:
    assert one.stops == other.stops
    for a, b in zip(one.tokens, other.tokens, strict=True):
        np.testing.assert_array_equal(a, b)


def chi_square_excess(counts: np.ndarray, probability: np.ndarray) -> float:
    """Pearson's statistic as a standard normal number (Wilson and Hilferty's cube root)."""
    expected = probability * counts.sum()
    assert expected.min() > 5
    freedom = counts.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def joint(rng_seed: int, axes: int) -> np.ndarray:
    """A distribution over `axes` tokens of 3 words with strong dependence, no outcome rarer than 1/4000."""
    weight = np.random.default_rng(rng_seed).integers(1, 4, (3,) * axes).astype(float) ** 2.5
    return weight / weight.sum()


def outcomes(result: Result, axes: int) -> np.ndarray:
    counts = np.zeros((3,) * axes)
    np.add.at(counts, tuple(np.stack([row[1:] for row in result.tokens], 1)), 1)
    return counts
