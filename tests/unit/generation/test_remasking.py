"""Remasking: what a correction masks again, what it never touches, what it costs and what it is good for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bd3_scale.errors import RecipeError
from bd3_scale.generation.cached_forward import CachedForward, Request
from bd3_scale.generation.token_sampling import SamplingOptions
from bd3_scale.objectives.table import Autoregressive, MaskedDiffusion
from tests.unit.generation.networks import WORDS, Table, assert_same, blocks_of, joint, sample, scrambled, tabular

PROMPTS: list[list[int]] = [[], [1, 2, 3], [4] * 9]


def test_without_corrections_it_is_ancestral_sampling() -> None:
    for objective in (blocks_of(8, 16), MaskedDiffusion(WORDS, 16)):
        options: dict[str, Any] = {"steps": 3, "seed": 2, "top_p": 0.8}
        plain = sample(Table(scrambled), objective, PROMPTS, 40, sampler="ancestral", **options)
        none = sample(Table(scrambled), objective, PROMPTS, 40, sampler="remasking", corrections=0, **options)
        assert_same(plain, none)
        some = sample(Table(scrambled), objective, PROMPTS, 40, sampler="remasking", corrections=2, **options)
        assert any((one != other).any() for one, other in zip(plain.tokens, some.tokens, strict=True))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, np.ndarray]]]:
    """(start, stop, tokens) of every noisy call."""
    found: list[tuple[int, int, np.ndarray]] = []
    answer = CachedForward.answer

    def noted(self: CachedForward, request: Request) -> Any:
        if not request.clean:
            found.append((request.start, request.stop, request.tokens.copy()))
        return answer(self, request)

    monkeypatch.setattr(CachedForward, "answer", noted)
    yield found


def test_a_correction_masks_some_of_its_own_block_and_nothing_else(asked: list[tuple[int, int, np.ndarray]]) -> None:
    """One row: T calls or fewer until a block is full, then C in which a T-th of it is masked; what was there before stays."""
    size, steps, corrections = 8, 4, 3
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    result = sample(Table(scrambled), blocks_of(size, 32), [prompt], 30, sampler="remasking", steps=steps, corrections=corrections)
    (text,) = result.tokens
    blocks = sorted({start for start, _, _ in asked})
    assert blocks == [8, 16, 24] and len(text) == 30
    for start in blocks:
        calls = [tokens[0] for first, _, tokens in asked if first == start]
        drawn = size - max(0, len(prompt) + 1 - start)
        count = -(-drawn // steps)
        left = [int((row[start : start + size] == WORDS).sum()) for row in calls]
        assert left[0] == drawn and left[-corrections:] == [count] * corrections and len(left) <= steps + corrections
        assert all(earlier > later for earlier, later in itertools.pairwise(left[:-corrections]))
        for row in calls:
            np.testing.assert_array_equal(row[:start], text[:start])
            np.testing.assert_array_equal(row[1 : len(prompt) + 1], prompt)


def test_corrections_mend_what_was_drawn_blindly() -> None:
    """A block in one step is drawn token by token from the marginals; each correction makes texts likelier under the joint law."""
    probability = joint(3, 5)

    def likelihood(**options: Any) -> float:
        result = sample(Table(tabular(probability)), blocks_of(6, 6, words=3), [[]] * 800, 6, words=3, steps=1, **options)
        return float(np.mean([np.log(probability[tuple(row[1:])]) for row in result.tokens]))

    found = [likelihood(sampler="remasking", corrections=count) for count in (0, 1, 4)]
    assert found[0] == likelihood(sampler="ancestral") and found[0] + 0.1 < found[1] < found[2] - 0.05, found


def test_what_cannot_be_corrected_is_refused_or_left() -> None:
    alone = [sample(Table(scrambled), blocks_of(1, 8), [[]], 8, sampler=sampler) for sampler in ("ancestral", "remasking")]
    assert_same(*alone)
    assert alone[0].nfe == alone[1].nfe, "a token alone has nothing to learn from the rest of its block"
    with pytest.raises(RecipeError, match="needs a diffusion model"):
        sample(Table(scrambled), Autoregressive(WORDS, 8), [[]], 8, sampler="remasking")
    for wrong in ({"sampler": "remasking", "corrections": -1}, {"sampler": "ancestral", "corrections": 1}):
        with pytest.raises(RecipeError, match="corrections is"):
            SamplingOptions(**wrong)  # type: ignore[arg-type]
