"""Texts of SSD-LM: exact where its predictions are, the same with the cache and without, and no call uncounted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.errors import RecipeError
from bd3_scale.objectives.simplex import K, SimplexNoise, masses
from bd3_scale.objectives.table import SimplexDiffusion
from tests.unit.generation.networks import (
    BOUND_1E4,
    WORDS,
    Counted,
    TableCache,
    assert_same,
    blocks_of,
    chi_square_excess,
    joint,
    outcomes,
    sample,
    transformer,
)

pytestmark = pytest.mark.usefixtures("world_of_one")


class Posterior:
    """The exact predictions of blocks whose positions are independent given the blocks before: p(word | x_t, clean tokens).

    `probability` [3, ...] is that of the tokens 1, 2, ...; position 0 is BOS, which stands alone or at the beginning of the first block.
    """

    def __init__(self, probability: np.ndarray) -> None:
        self.table, self.told = torch.from_numpy(probability), list[float]()

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
        simplex: SimplexNoise | None = None,
    ) -> Tensor:
        before = cache.tokens
        if commit:
            cache.append(tokens, positions)
            assert simplex is None and noise_levels is None
            return torch.zeros(len(tokens), 0, 0)
        assert simplex is not None and noise_levels is not None and last == tokens.shape[1]
        self.told.append(float(noise_levels[0, 0]))
        # Normal densities of x_t given each word differ by exp(2 signal x_word / (spread^2 K)); all x_t may be shifted alike.
        x = masses(tokens.flatten(), *simplex.flat(), 0, 3).log().view(*tokens.shape, 3).double()
        evidence = 2 * (simplex.signal / simplex.spread.square() / K)[..., None].double() * x
        logits = torch.full((*tokens.shape, 4), -torch.inf, dtype=torch.float64)
        for column, position in enumerate(positions.tolist()):
            if position > 0:
                logits[:, column, :3] = self._prior(before, position).log() + evidence[:, column]
            else:
                logits[:, column, 0] = 0.0
        return logits

    def _prior(self, before: Tensor, position: int) -> Tensor:
        """p(token at `position` | clean tokens), [b, 3]."""
        known = [before[:, index] for index in range(1, before.shape[1])]
        axis = position - 1
        others = tuple(index for index in range(len(known), self.table.ndim) if index != axis)
        marginal = self.table.sum(others) if others else self.table
        chosen = marginal[tuple(known)] if known else marginal.expand(len(before), 3)
        return chosen / chosen.sum(-1, keepdim=True)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_exact_predictions_give_the_exact_distribution(steps: int) -> None:
    """L' = 1: a word drawn given x_t and noised anew is one of the forward process again, whatever T (chi-square, level 1e-4)."""
    probability = joint(4, 3)
    network = Posterior(probability)
    result = sample(network, SimplexDiffusion(3, 4, 1), [[]] * 6000, 4, words=3, sampler="simplex", steps=steps)
    assert chi_square_excess(outcomes(result, 3).ravel(), probability.ravel()) < BOUND_1E4
    times = [1000 * (steps - step) / steps for step in range(steps)]
    assert network.told == pytest.approx(times * 3)


def test_positions_of_a_block_are_drawn_side_by_side() -> None:
    """L' = 2 over independent positions, BOS inside of the first block."""
    one, other, last = np.random.default_rng(0).dirichlet(np.full(3, 3.0), 3)
    probability = one[:, None, None] * other[None, :, None] * last[None, None, :]
    result = sample(Posterior(probability), SimplexDiffusion(3, 4, 2), [[]] * 6000, 4, words=3, sampler="simplex", steps=5)
    assert chi_square_excess(outcomes(result, 3).ravel(), probability.ravel()) < BOUND_1E4


def told(context: int, **variant: Any) -> Any:
    return transformer(context, conditioning="adaln", conditioning_size=8, **variant)


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_every_call_is_counted_and_no_mask_is_left(block_size: int, steps: int) -> None:
    """Texts that end inside a block, beyond the context, with prompts; T calls a block, and one to read it where it is read."""
    network, objective, length = Counted(told(16)), SimplexDiffusion(WORDS, 16, block_size), 22
    result = sample(network, objective, [[], [1, 2, 3, 4, 5], [7]], length, steps=steps, sampler=None, top_p=0.9)
    assert result.nfe == network.calls
    assert all(len(row) == length and row.min() >= 0 and row.max() < WORDS for row in result.tokens)
    assert result.tokens[1][1:6].tolist() == [1, 2, 3, 4, 5] and result.tokens[2][1] == 7
    blocks = {1: 21, 4: 6, 16: 2}[block_size]
    reads = {1: 21, 4: 5, 16: 0}[block_size]  # the last block is not read, nor any window
    assert result.nfe == blocks * steps + reads


@pytest.mark.parametrize("clean_half", ["block_causal", "causal"])
@pytest.mark.parametrize("variant", [{}, {"positions": "learned"}], ids=["rotary", "learned"])
def test_the_cache_changes_no_text(variant: dict, clean_half: str) -> None:
    network, objective = told(16, **variant), SimplexDiffusion(WORDS, 16, 4, clean_half=clean_half)
    length = 16 if variant else 26
    both = [
        sample(network, objective, [[], [1, 2, 3, 4, 5]], length, sampler="simplex", steps=3, use_cache=cache) for cache in (True, False)
    ]
    assert_same(*both)
    assert both[1].nfe < both[0].nfe, "nothing is read for good"


def test_a_row_depends_on_its_own_number_alone() -> None:
    network, objective = told(16), SimplexDiffusion(WORDS, 16, 4)
    together = sample(network, objective, [[], [3], []], 16, steps=4, sampler="simplex")
    alone = sample(network, objective, [[]], 16, steps=4, sampler="simplex", first_row=2)
    np.testing.assert_array_equal(together.tokens[2], alone.tokens[0])
    assert not np.array_equal(together.tokens[0], together.tokens[2])
    other = sample(network, objective, [[]], 16, steps=4, sampler="simplex", first_row=2, seed=1)
    assert not np.array_equal(other.tokens[0], alone.tokens[0])


def test_samplers_of_other_objectives_are_refused_and_this_one_elsewhere() -> None:
    network = told(8)
    for sampler in ("first_hitting", "ancestral", "confidence"):
        with pytest.raises(RecipeError, match=r"ssdlm.*set simplex"):
            sample(network, SimplexDiffusion(WORDS, 8, 4), [[]], 8, sampler=sampler)
    with pytest.raises(RecipeError, match="masked words; set first_hitting"):
        sample(network, blocks_of(4, 8), [[]], 8, sampler="simplex")
    with pytest.raises(RecipeError, match="threshold"):
        sample(network, SimplexDiffusion(WORDS, 8, 4), [[]], 8, sampler=None, threshold=0.5)
