"""Continuous refill: every text is the one that it is alone, whatever prompts, lengths and ends the others have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bd3_scale.generation.sampler import generate
from bd3_scale.generation.slots import Finished, Job, SlotForward, generate_each
from bd3_scale.generation.token_sampling import SamplingOptions
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import Autoregressive, BlockDiffusion, MaskedDiffusion, Objective, ScoreEntropy, SimplexDiffusion
from tests.unit.generation.networks import WORDS, blocks_of, given, transformer

pytestmark = pytest.mark.usefixtures("world_of_one")

CONTEXT = 32
LENGTHS = (1, 7, 65, 0, 20, 3)
"""Tokens of the prompts, beside the one that begins a text."""
ADALN: dict[str, Any] = {"conditioning": "adaln", "conditioning_size": 8}
CASES: dict[str, tuple[Objective, dict[str, Any], dict[str, Any]]] = {
    "first hitting, 4": (blocks_of(4, CONTEXT), {}, {"top_p": 0.9}),
    "first hitting, 16": (blocks_of(16, CONTEXT), {"key_value_heads": 1}, {}),
    "ancestral, 4": (blocks_of(4, CONTEXT), ADALN, {"sampler": "ancestral", "steps": 3}),
    "ancestral, 16": (blocks_of(16, CONTEXT, "causal"), {}, {"sampler": "ancestral", "steps": 5}),
    "confidence, 4": (BlockDiffusion(WORDS, CONTEXT, 4, document_end=3), {}, {"sampler": "confidence", "threshold": 0.3}),
    "confidence, 16": (blocks_of(16, CONTEXT), {"unrotated_every": 2}, {"sampler": "confidence", "threshold": 0.3}),
    "remasking, 4": (blocks_of(4, CONTEXT), ADALN, {"sampler": "remasking", "steps": 2, "corrections": 3}),
    "remasking, 16": (blocks_of(16, CONTEXT, "causal"), {}, {"sampler": "remasking", "steps": 4}),
    "learned positions": (blocks_of(4, 96), {"positions": "learned"}, {}),
    "next token": (Autoregressive(WORDS, CONTEXT), {}, {}),
    "windows": (MaskedDiffusion(WORDS, CONTEXT), {}, {"sampler": "ancestral", "steps": 8}),
    "scores": (ScoreEntropy(WORDS, CONTEXT), ADALN, {"sampler": "analytic", "steps": 6}),
    "simplex, 4": (SimplexDiffusion(WORDS, CONTEXT, 4), ADALN, {"sampler": "simplex", "steps": 3}),
}


def jobs(options: SamplingOptions, length: int = 80) -> list[Job]:
    words = np.random.default_rng(0).integers(0, WORDS - 1, 80)
    rows = [given([[int(word) for word in words[place : place + count]]], length + place) for place, count in enumerate(LENGTHS)]
    return [Job(place, tokens[0], known[0], options, WORDS - 1) for place, (tokens, known) in enumerate(rows)]


def through(network: Transformer, objective: Objective, wanted: list[Job], slots: int, use_cache: bool = True) -> list[Finished]:
    found = generate_each(network, objective, wanted, slots=slots, longest=90, mask_id=WORDS, seed=7, use_cache=use_cache)
    return sorted(found, key=lambda one: one.place)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_text_is_the_one_that_it_is_alone(name: str, use_cache: bool) -> None:
    objective, variant, chosen = CASES[name]
    network, options = transformer(objective.pattern.length, **variant), SamplingOptions(**{"sampler": "first_hitting", **chosen})
    wanted = jobs(options)
    found = through(network, objective, wanted, 3, use_cache)
    assert [one.place for one in found] == list(range(len(wanted)))
    for job, one in zip(wanted, found, strict=True):
        alone = generate(
            network, objective, job.tokens[None], job.known[None], options, mask_id=WORDS, end_of_text=WORDS - 1, seed=7, first_row=job.row
        )
        np.testing.assert_array_equal(one.tokens, alone.tokens[0])
        assert (one.stop, one.prompt) == (alone.stops[0], alone.prompt_lengths[0])
    assert len({len(one.tokens) for one in found}) > 3, "texts that end at different times"


def test_who_has_finished_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots: a long text and several short ones beside it take hardly more calls than the long one."""
    network, objective, options = transformer(CONTEXT), blocks_of(4, CONTEXT), SamplingOptions()
    made: list[SlotForward] = []
    begun = SlotForward.__init__

    def noted(self: SlotForward, *arguments: Any) -> None:
        made.append(self)
        begun(self, *arguments)

    monkeypatch.setattr(SlotForward, "__init__", noted)
    rows = [given([[]], length) for length in (80, 12, 12, 12, 12)]
    wanted = [Job(place, tokens[0], known[0], options, None) for place, (tokens, known) in enumerate(rows)]
    (alone,) = through(network, objective, wanted[:1], 1)
    together = list(generate_each(network, objective, wanted, slots=2, longest=80, mask_id=WORDS, seed=7))
    assert [one.place for one in together] == [1, 2, 3, 4, 0] and len(alone.tokens) == 80
    assert made[1].nfe == made[0].nfe == 79 + 19


def test_a_text_ends_where_it_is_told_to() -> None:
    network, objective = transformer(CONTEXT), blocks_of(4, CONTEXT)
    job = replace(jobs(SamplingOptions())[0], end_of_text=None)
    (free,) = through(network, objective, [job], 1)
    word = int(free.tokens[9])
    (one,) = through(network, objective, [replace(job, until=lambda new: word in new.tolist())], 1)
    assert one.stop == "until" and word in one.tokens[one.prompt :] and len(one.tokens) <= 12
    assert torch.equal(torch.from_numpy(one.tokens), torch.from_numpy(free.tokens[: len(one.tokens)]))
