"""Sampling: cached = uncached, the distribution it draws from, windows, rows on their own, the count of calls, stops, nucleus."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.errors import CheckpointError, RecipeError
from bd3_scale.generation.sampler import generate
from bd3_scale.generation.token_sampling import SamplingOptions, draw, histogram_entropy, nucleus
from bd3_scale.objectives.network_inputs import DataRows, network_inputs
from bd3_scale.objectives.table import Autoregressive, BlockDiffusion, MaskedDiffusion, Objective
from tests.unit.generation.networks import (
    BOUND_1E4,
    WORDS,
    Counted,
    Table,
    assert_same,
    blocks_of,
    chi_square_excess,
    given,
    joint,
    outcomes,
    sample,
    scrambled,
    tabular,
    transformer,
)

SAMPLERS: dict[str, dict[str, Any]] = {
    "first_hitting": {"sampler": "first_hitting"},
    "ancestral": {"sampler": "ancestral", "steps": 3},
    "confidence": {"sampler": "confidence", "threshold": 0.3, "top_p": 0.9, "temperature": 0.8},
    "remasking": {"sampler": "remasking", "steps": 3, "corrections": 2, "top_p": 0.9},
}

# -- With the cache and without ----------------------------------------------------------------------------------------

PROMPTS = [[], [1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5]]
LONG_PROMPT = [int(token) for token in np.random.default_rng(0).integers(0, WORDS - 1, 57)]


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_cache_changes_no_token(sampler: str, block_size: int) -> None:
    """Prompts of several lengths, texts of 2.3 contexts that end inside a block, calls counted from outside."""
    network = Counted(transformer(16))
    objective = blocks_of(block_size, 16)
    cached = sample(network, objective, PROMPTS, 37, **SAMPLERS[sampler])
    assert cached.nfe == network.calls
    uncached = sample(network, objective, PROMPTS, 37, use_cache=False, **SAMPLERS[sampler])
    assert cached.nfe + uncached.nfe == network.calls
    assert uncached.nfe < cached.nfe
    assert_same(cached, uncached)
    assert all(len(row) == 37 and row.max() < WORDS for row in cached.tokens)
    assert len({tuple(row) for row in cached.tokens}) == 3


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("variant", ["causal clean half", "adaln, grouped queries", "next token", "one block", "documents"])
def test_the_cache_changes_no_token_of_other_networks(variant: str) -> None:
    context, length = 16, 33
    objective: Objective = blocks_of(4, context)
    network = transformer(context)
    if variant == "next token":
        objective = Autoregressive(WORDS, context)
    elif variant == "one block":
        objective, length = MaskedDiffusion(WORDS, context), context
    elif variant == "documents":
        objective = BlockDiffusion(WORDS, context, 4, document_end=3)
    elif variant == "causal clean half":
        objective = blocks_of(4, context, "causal")
    else:
        network = transformer(context, conditioning="adaln", conditioning_size=8, key_value_heads=1)
    cached = sample(network, objective, [[], [1, 2, 3, 4, 5, 6]], length)
    assert_same(cached, sample(network, objective, [[], [1, 2, 3, 4, 5, 6]], length, use_cache=False))
    if variant == "next token":
        assert cached.nfe == length - 1  # a call per token but the last; the first is its own prefill


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(
    "objective",
    [
        *(blocks_of(4, 16), blocks_of(4, 16, "causal"), blocks_of(1, 16), MaskedDiffusion(WORDS, 16), Autoregressive(WORDS, 16)),
        *(
            BlockDiffusion(WORDS, 16, size, clean_half=half, document_end=8)
            for size, half in ((4, "block_causal"), (4, "causal"), (1, "causal"))
        ),
        Autoregressive(WORDS, 16, document_end=6),
    ],
    ids=["bd3", "bd3 causal", "bd3 of 1", "mdlm", "ar", "bd3, documents", "bd3 causal, documents", "bd3 of 1, documents", "ar, documents"],
)
def test_sampling_sees_what_training_saw(objective: Objective) -> None:
    """The logits of every call are those of the training forward on the finished text and the block as it was then."""
    network, calls = transformer(16), []
    decode = network.decode

    def recorded(
        tokens: Tensor, positions: Tensor, cache: Any, mask: Tensor | None, commit: bool = False, last: int = 0, **told: Tensor | None
    ) -> Tensor:
        logits = decode(tokens, positions, cache, mask, commit, last, **told)
        if last:
            calls.append((positions[-last:].numpy(), tokens[:, -last:].numpy(), logits.log_softmax(-1)[0]))
        return logits

    network.decode = recorded  # type: ignore[method-assign]
    clean = sample(network, objective, [[]], 16).tokens[0][None]
    assert len(calls) == 15
    assert objective.pattern.document_end is None or (clean[0, 1:-4] == objective.pattern.document_end).any(), "no document ends"
    rows = DataRows.of(clean, 1, objective.pattern, WORDS)
    for positions, block, log_p in calls:
        noisy = clean.copy()
        noisy[:, positions] = block
        for target in range(WORDS):
            targets = np.full(len(positions), target)
            weights, keys = np.ones(len(positions)), np.zeros(1, np.int64)
            inputs = network_inputs(noisy, rows, positions, targets, weights, keys, objective.pattern, 1)
            torch.testing.assert_close(network(inputs)[1], -log_p[:, target], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_cache_forgets_what_nobody_sees(sampler: str, block_size: int) -> None:
    """A prompt of 3.6 contexts and a text of 6, on a table whose logits tell every single token that is seen."""
    network, context = Table(scrambled), 16
    objective = blocks_of(block_size, context)
    cached = sample(network, objective, [LONG_PROMPT, []], 97, **SAMPLERS[sampler])
    assert 0 < network.held <= context + context // 4
    assert_same(cached, sample(network, objective, [LONG_PROMPT, []], 97, use_cache=False, **SAMPLERS[sampler]))
    short = Table(scrambled)
    sample(short, objective, [[]], 97, **SAMPLERS[sampler])
    assert 0 < short.held <= context + context // 4


def test_a_prompt_is_read_in_one_call() -> None:
    """16 known tokens of 4 blocks: one call to read them, then 8 tokens in 2 blocks and one call that commits the first."""
    network = Table(scrambled)
    assert sample(network, blocks_of(4, 32), [list(range(10)) + [1] * 5] * 2, 24).nfe == 1 + 4 + 1 + 4


def test_confidence_reveals_what_is_above_the_threshold_and_one_at_least() -> None:
    """A table that is sure at even positions (0.9) and not at odd ones (0.5), in the network's own probabilities."""

    def rule(query: int, positions: Tensor, tokens: Tensor) -> Tensor:
        top = 0.5 if query % 2 else 0.9
        return torch.tensor([top, *[(1 - top) / (WORDS - 1)] * (WORDS - 1), 0.0]).log().expand(len(tokens), -1)

    calls = {
        threshold: sample(Table(rule), blocks_of(8, 8), [[]] * 3, 8, sampler="confidence", threshold=threshold, top_p=0.4).nfe
        for threshold in (0.4, 0.6, 0.95)
    }
    assert calls == {0.4: 1, 0.6: 1 + 4, 0.95: 7}  # all at once; the three even ones, then four odd ones; one by one


# -- MASK --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [16, 22])
def test_no_mask_is_left_after_any_number_of_steps(steps: int, length: int) -> None:
    network = Table(scrambled)
    result = sample(network, blocks_of(8, 16), [[], [1, 2]], length, sampler="ancestral", steps=steps)
    assert all(len(row) == length and row.min() >= 0 and row.max() < WORDS for row in result.tokens)
    blocks = -(-length // 8)
    assert result.nfe == network.calls <= blocks * steps + blocks - 1


def test_steps_that_reveal_nothing_call_no_network() -> None:
    """T far above L': no more than a call per token, and each call reveals something."""
    network = Table(scrambled)
    result = sample(network, blocks_of(8, 16), [[]], 16, sampler="ancestral", steps=1000)
    assert result.nfe <= 15 + 1


def test_no_number_draws_an_impossible_token() -> None:
    """MASK, last in the vocabulary with probability 0, must not come out, for the ends of [0, 1) neither."""
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.7, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    for number in (1 - 2**-53, 0.0, 2**-53, *np.random.default_rng(0).random(500)):
        drawn = draw(logits, torch.full((3,), float(number), dtype=torch.float64), SamplingOptions())
        assert drawn[0] < 3 and drawn[1] < 3 and drawn[2] == 1


def test_rounding_of_the_logits_does_not_change_the_draw() -> None:
    """What cached = uncached rests on: noise of 1e-6 on 50,000 logits leaves (nearly) every draw as it is."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 50_000, generator=generator)
    noisy = logits + 1e-6 * torch.randn(logits.shape, generator=generator)
    uniforms = torch.rand(400, dtype=torch.float64, generator=generator)
    assert (draw(logits, uniforms, SamplingOptions()) == draw(noisy, uniforms, SamplingOptions())).all()


def test_a_diverged_network_is_an_error() -> None:
    network = Table(lambda query, positions, tokens: torch.full((len(tokens), WORDS + 1), torch.nan))
    for sampler in SAMPLERS:
        with pytest.raises(CheckpointError, match="not finite"):
            sample(network, blocks_of(4, 16), [[]], 8, sampler=sampler)


# -- The distribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"sampler": "ancestral", "steps": 4000}, {"sampler": "confidence", "threshold": 1.0}], ids=str)
def test_texts_have_the_distribution_of_the_model(options: dict[str, Any]) -> None:
    """Chi-square over all 243 texts of two blocks of three (BOS and five tokens), 20000 texts, level 1e-4."""
    probability = joint(3, 5)
    result = sample(Table(tabular(probability)), blocks_of(3, 6, words=3), [[]] * 20000, 6, words=3, **options)
    assert chi_square_excess(outcomes(result, 5).ravel(), probability.ravel()) < BOUND_1E4


def test_one_step_has_not_and_the_test_can_tell() -> None:
    """T = 1 draws the tokens of a block independently: the product of the marginals, and not the model."""
    probability = joint(3, 5)
    counts = outcomes(
        sample(Table(tabular(probability)), blocks_of(6, 6, words=3), [[]] * 20000, 6, words=3, sampler="ancestral", steps=1), 5
    )
    assert chi_square_excess(counts.ravel(), probability.ravel()) > 2 * BOUND_1E4
    marginals = [probability.sum(tuple(other for other in range(5) if other != axis)) for axis in range(5)]
    product = np.array([math.prod(m[i] for m, i in zip(marginals, text, strict=True)) for text in itertools.product(range(3), repeat=5)])
    assert chi_square_excess(counts.ravel(), product) < BOUND_1E4


def test_steps_are_revealed_as_the_posterior_says() -> None:
    """Two equal tokens differ only if one step reveals both, with probability 1 / T, and then in two of three (level 1e-4)."""
    steps, rows = 4, 20000
    result = sample(
        Table(tabular(np.eye(3) / 3)), blocks_of(3, 6, words=3), [[]] * rows, 3, words=3, sampler="ancestral", steps=steps
    )  # fmt: skip
    differ = sum(row[1] != row[2] for row in result.tokens)
    share = 2 / 3 / steps
    assert chi_square_excess(np.array([differ, rows - differ], float), np.array([share, 1 - share])) < BOUND_1E4


def test_the_first_hit_is_uniform() -> None:
    """Which of the seven masked tokens of a block is revealed first, 5000 rows, level 1e-4."""
    seen: list[Tensor] = []

    def rule(query: int, positions: Tensor, tokens: Tensor) -> Tensor:
        if query == 7:
            seen.append(tokens.clone())
        return scrambled(query, positions, tokens)

    sample(Table(rule), blocks_of(8, 16), [[]] * 5000, 8)
    assert [int((tokens != WORDS).sum()) for tokens in seen] == [5000 * count for count in range(1, 8)]
    counts = (seen[1][:, 1:] != WORDS).sum(0).numpy().astype(float)
    assert chi_square_excess(counts, np.full(7, 1 / 7)) < BOUND_1E4


def test_what_is_known_is_conditioned_on() -> None:
    """A hole between known tokens: its token follows the conditional given both sides of its block (level 1e-4)."""
    probability = joint(5, 3)
    tokens, known = given([[0, 0, 1]] * 5000, 4, begin=2)
    known[:, 2] = False
    network, objective = Table(tabular(probability)), blocks_of(4, 4, words=3)
    result = generate(network, objective, tokens, known, SamplingOptions(), mask_id=3, end_of_text=None)
    counts = np.bincount([row[2] for row in result.tokens], minlength=3).astype(float)
    conditional = probability[0, :, 1] / probability[0, :, 1].sum()
    assert all(row[1] == 0 and row[3] == 1 for row in result.tokens)
    assert chi_square_excess(counts, conditional) < BOUND_1E4


# -- Rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_knows_nothing_of_the_others(sampler: str) -> None:
    """Each row alone, at its own index, is the row of the batch, whatever prompts, lengths and stops the others have."""
    network, objective = transformer(16), blocks_of(4, 16)
    options = SAMPLERS[sampler]
    together = sample(network, objective, PROMPTS, 30, seed=5, stop=True, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(network, objective, [prompt], 30, seed=5, stop=True, first_row=row, **options)
        assert alone.stops[0] == together.stops[row]
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    assert len({together.stops[row] for row in range(3)} | {"end_of_text", "length"}) == 2


def test_seeds_and_rows_differ_and_repeat() -> None:
    network, objective = Table(scrambled), blocks_of(4, 16)
    first, again, other = (sample(network, objective, [[]] * 3, 24, seed=seed) for seed in (0, 0, 1))
    assert_same(first, again)
    assert len({tuple(row) for result in (first, other) for row in result.tokens}) == 6


# -- Windows of networks whose rows are one block ----------------------------------------------------------------------


@pytest.mark.parametrize("context", [16, 5, 2])
@pytest.mark.parametrize("make", [MaskedDiffusion, lambda words, context: BlockDiffusion(words, context, context)], ids=["mdlm", "bd3"])
def test_a_window_goes_on_from_the_half_before(make: Callable[[int, int], Objective], context: int) -> None:
    """Every call is on L tokens at the positions of training, of which a later window knows the first ones: the text so far."""
    seen: list[Tensor] = []

    def rule(query: int, positions: Tensor, tokens: Tensor) -> Tensor:
        if query == 0:
            assert positions.tolist() == list(range(context))
            seen.append(tokens[0].clone())
        return scrambled(query, positions, tokens)

    length, stride = 3 * context + 1, context // 2
    network = Table(rule)
    result = sample(network, make(WORDS, context), [[]], length)
    (text,) = result.tokens
    assert len(text) == length and text.max() < WORDS
    windows = 1 + -(-(length - context) // stride)
    # The last window is a whole one, of which the tokens beyond the text are left where those within it are known.
    assert (context - 1) + stride * (windows - 2) < result.nfe == network.calls <= (context - 1) + stride * (windows - 1)
    for call, tokens in enumerate(seen):
        start = max(0, 1 + (call - (context - 1)) // stride) * stride
        text_here = text[start : start + context]
        known = (tokens != WORDS).numpy()[: len(text_here)]
        np.testing.assert_array_equal(tokens.numpy()[: len(text_here)][known], text_here[known])
        assert known[: context - stride].all() or start == 0
    short = sample(Table(scrambled), make(WORDS, context), [[]], context).tokens[0]
    np.testing.assert_array_equal(text[:context], short)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_of_windows_know_nothing_of_each_other(sampler: str) -> None:
    """Prompts of none, some and many windows; learned positions are no hindrance."""
    network, objective = transformer(16, positions="learned"), MaskedDiffusion(WORDS, 16)
    together = sample(network, objective, [[], LONG_PROMPT[:9], LONG_PROMPT[:30]], 45, seed=5, stop=True, **SAMPLERS[sampler])
    for row, prompt in enumerate(([], LONG_PROMPT[:9], LONG_PROMPT[:30])):
        alone = sample(network, objective, [prompt], 45, seed=5, stop=True, first_row=row, **SAMPLERS[sampler])
        assert alone.stops[0] == together.stops[row]
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_array_equal(alone.tokens[0][1 : len(prompt) + 1], prompt)


# -- Stops -------------------------------------------------------------------------------------------------------------


def reciting(text: dict[int, int], otherwise: int = 0) -> Callable[[int, Tensor, Tensor], Tensor]:
    """A table that says one token at each position."""

    def rule(query: int, positions: Tensor, tokens: Tensor) -> Tensor:
        logits = torch.full((len(tokens), WORDS + 1), -torch.inf)
        logits[:, text.get(query, otherwise)] = 0.0
        return logits

    return rule


def test_a_text_ends_before_its_end_of_text() -> None:
    """That of the prompt does not count; the batch goes on until every row has ended, and not a call further."""
    end = WORDS - 1
    network = Table(reciting({9: end, 11: end}, otherwise=3))
    result = sample(network, blocks_of(4, 32), [[], [1, end, 2]], 32, stop=True)
    assert result.stops == ["end_of_text", "end_of_text"]
    assert result.tokens[0].tolist() == [end] + [3] * 8
    assert result.tokens[1].tolist() == [end, 1, end, 2] + [3] * 5
    # Row 0's first block: 3 calls. Two more of 4, each with one that commits the block before.
    assert result.nfe == network.calls == 3 + (1 + 4) + (1 + 4)
    ignored = sample(Table(reciting({9: end}, otherwise=3)), blocks_of(4, 32), [[]], 32)
    assert ignored.stops == ["length"] and len(ignored.tokens[0]) == 32 and ignored.tokens[0][9] == end


def test_a_finished_row_does_not_hold_up_or_change_the_others() -> None:
    def rule(query: int, positions: Tensor, tokens: Tensor) -> Tensor:
        logits = scrambled(query, positions, tokens)
        logits[:, WORDS - 1] = -torch.inf
        first = tokens[:, positions.tolist().index(1)] if 1 in positions else torch.zeros(len(tokens))
        if query == 4:
            logits[first == 5] = torch.where(torch.arange(WORDS + 1) == WORDS - 1, 0.0, -torch.inf)
        return logits

    objective = blocks_of(4, 16)
    both = sample(Table(rule), objective, [[5], [6]], 24, stop=True)
    assert both.stops == ["end_of_text", "length"] and len(both.tokens[0]) == 4
    alone = sample(Table(rule), objective, [[6]], 24, stop=True, first_row=1)
    np.testing.assert_array_equal(both.tokens[1], alone.tokens[0])


def test_a_text_that_repeats_itself_ends() -> None:
    """300 lively tokens, then one word for ever. Off by default; the uniform histogram of 8 words has log 8 nats."""
    rule = reciting({position: position % 8 for position in range(300)}, otherwise=0)
    dull = sample(Table(rule), blocks_of(4, 8), [[]], 800, minimum_entropy=1.0)
    lively = sample(Table(rule), blocks_of(4, 8), [[]], 296, minimum_entropy=1.0)
    assert dull.stops == ["entropy"] and len(dull.tokens[0]) < 560
    assert lively.stops == ["length"]
    assert sample(Table(rule), blocks_of(4, 8), [[]], 600).stops == ["length"]
    assert histogram_entropy(np.arange(256) % 8) == pytest.approx(math.log(8))
    assert histogram_entropy(np.zeros(256, np.int64)) == 0


def test_nothing_to_do_calls_nothing() -> None:
    result = sample(Table(scrambled), blocks_of(4, 16), [[1, 2, 3]], 4)
    assert result.nfe == 0 and result.tokens[0].tolist() == [WORDS - 1, 1, 2, 3]


# -- Nucleus and options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_p", "keep", "strict"),
    [
        (1e-9, {2}, {2}),  # never empty
        (0.4, {2}, {2}),  # reached exactly: nothing crosses
        (0.41, {2, 0}, {2}),
        (0.7, {2, 0}, {2, 0}),
        (0.75, {2, 0, 1}, {2, 0}),
        (0.999, {2, 0, 1, 3}, {2, 0, 1}),
    ],
)
def test_the_nucleus_keeps_the_token_that_crosses(top_p: float, keep: set[int], strict: set[int]) -> None:
    probabilities = torch.tensor([[0.3, 0.2, 0.4, 0.1, 0.0]], dtype=torch.float64)
    for drops, expected in ((False, keep), (True, strict)):
        kept = nucleus(probabilities, top_p, strict=drops)
        assert set(torch.nonzero(kept[0]).flatten().tolist()) == expected
        torch.testing.assert_close(kept[0][sorted(expected)], probabilities[0][sorted(expected)], rtol=0, atol=0)


def test_of_equal_tokens_the_nucleus_takes_the_first() -> None:
    kept = nucleus(torch.full((1, 4), 0.25, dtype=torch.float64), 0.5)
    assert kept[0].tolist() == [0.25, 0.25, 0, 0]


def test_temperature() -> None:
    """0 takes the most probable token; 2 draws in proportion to the square root (level 1e-4)."""
    probabilities = torch.tensor([0.64, 0.04, 0.32])
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20000))
    logits = torch.cat([probabilities.log(), torch.tensor([-torch.inf])]).expand(20000, 4)
    assert set(draw(logits, uniforms, SamplingOptions(temperature=0)).tolist()) == {0}
    counts = np.bincount(draw(logits, uniforms, SamplingOptions(temperature=2)).numpy(), minlength=3)
    root = probabilities.double().sqrt().numpy()
    assert chi_square_excess(counts.astype(float), root / root.sum()) < BOUND_1E4


@pytest.mark.parametrize(
    "wrong",
    [
        {"sampler": "gibbs"}, {"steps": 3}, {"sampler": "ancestral", "steps": 0}, {"threshold": 0.5}, {"top_p": 0.0}, {"top_p": 1.1},
        {"sampler": "euler", "steps": 0}, {"sampler": "analytic", "threshold": 0.5},
        {"sampler": "confidence", "threshold": 1.5}, {"temperature": -1.0}, {"temperature": math.nan}, {"nucleus": "loose", "top_p": 0.5},
        {"minimum_entropy": -1.0}, {"top_p": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as refused:
        SamplingOptions(**wrong)
    assert "\n" not in str(refused.value)
