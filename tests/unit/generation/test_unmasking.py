"""The samplers against each other and against their own laws, every one with every objective: MASK, calls, what is told."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.errors import CheckpointError, RecipeError
from bd3_scale.objectives.table import Autoregressive, BlockDiffusion, MaskedDiffusion, Objective, ScoreEntropy
from tests.unit.generation.networks import BOUND_1E4, WORDS, Counted, Table, chi_square_excess, joint, outcomes, sample, scrambled, tabular

AXES = 3
"""Tokens of a text of the tables, of three words each; a BOS stands before them."""


def scores(probability: np.ndarray, mass: Callable[[int, np.ndarray], np.ndarray]) -> Callable[[int, Tensor, Tensor], Tensor]:
    """The exact conditionals as log-scores z whose mean of exp is mass(axis, number of known tokens of every row)."""
    conditionals = tabular(probability)

    def rule(query: int, positions: Tensor, tokens: Tensor) -> Tensor:
        known = (tokens[:, 1:] != 3).sum(1).numpy()
        height = torch.from_numpy(np.log(3 * mass(query - 1, known))).float()
        return conditionals(query, positions, tokens).log_softmax(-1) + height[:, None]

    return rule


def one(axis: int, known: np.ndarray) -> np.ndarray:
    return np.ones(len(known))


def uneven(axis: int, known: np.ndarray) -> np.ndarray:
    return 0.2 + 0.1 * axis + 0.1 * known


def law(probability: np.ndarray, factors: list[float], mass: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """The distribution of texts, by enumeration: step k reveals each masked token with min(1, factor * mass), the last one all."""
    states: dict[tuple[int, ...], float] = {(3,) * AXES: 1.0}
    for step, factor in enumerate(factors):
        after: dict[tuple[int, ...], float] = defaultdict(float)
        for state, weight in states.items():
            choices: list[list[tuple[int, float]]] = []
            for axis, token in enumerate(state):
                if token != 3:
                    choices.append([(token, 1.0)])
                    continue
                seen = probability[tuple(slice(None) if other == 3 else other for other in state)]
                left = [other for other in range(AXES) if state[other] == 3]
                conditional = seen.sum(tuple(place for place, other in enumerate(left) if other != axis))
                conditional = conditional / conditional.sum()
                known = np.array([AXES - len(left)])
                reveal = 1.0 if step + 1 == len(factors) else min(1.0, factor * float(mass(axis, known)[0]))
                choices.append([(3, 1 - reveal), *((word, reveal * conditional[word]) for word in range(3))])
            for combination in itertools.product(*choices):
                after[tuple(token for token, _ in combination)] += weight * float(np.prod([chance for _, chance in combination]))
        states = after
    result = np.zeros((3,) * AXES)
    for state, weight in states.items():
        if 3 not in state:
            result[state] += weight
    assert result.sum() == pytest.approx(1)
    return result


def texts(rule: Callable[[int, Tensor, Tensor], Tensor], objective: Objective, rows: int, **options: Any) -> np.ndarray:
    return outcomes(sample(Table(rule), objective, [[]] * rows, AXES + 1, words=3, **options), AXES).ravel()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samplers_with_the_same_steps_have_the_same_law(steps: int) -> None:
    """Ancestral of mdlm and of sedd, analytic, Euler with exact scores: that of the enumeration (chi-square, level 1e-4)."""
    probability = joint(4, AXES)
    expected = law(probability, [1 / (steps - step) for step in range(steps)], one).ravel()
    if steps < 5:
        assert chi_square_excess(20000 * expected, probability.ravel()) > BOUND_1E4, "or the steps change nothing"
    rule = scores(probability, one)
    for sampler, objective in (
        ("ancestral", MaskedDiffusion(3, AXES + 1)),
        ("ancestral", ScoreEntropy(3, AXES + 1)),
        ("analytic", ScoreEntropy(3, AXES + 1)),
        ("euler", ScoreEntropy(3, AXES + 1)),
    ):
        assert chi_square_excess(texts(rule, objective, 8000, sampler=sampler, steps=steps), expected) < BOUND_1E4, sampler


@pytest.mark.parametrize(
    "options",
    [{}, {"sampler": "ancestral", "steps": 4000}, {"sampler": "analytic", "steps": 80}, {"sampler": "euler", "steps": 80}],
    ids=str,
)
def test_many_steps_and_the_first_hits_have_the_law_of_the_model(options: dict[str, Any]) -> None:
    """Chi-square over all 27 texts of a block of three, 3000 texts, level 1e-4."""
    probability = joint(4, AXES)
    counts = texts(scores(probability, one), ScoreEntropy(3, AXES + 1), 3000, **options)
    assert chi_square_excess(counts, probability.ravel()) < BOUND_1E4


@pytest.mark.parametrize("sampler", ["analytic", "euler"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_mass_of_the_scores_decides_what_is_revealed(sampler: str, schedule: str) -> None:
    """Scores that are not normalised, on the time steps of the schedule: the law of the enumeration, and not that of A = 1."""
    probability, steps = joint(4, AXES), 3
    times = np.array([1, 2 / 3, 1 / 3, 0])
    masked = times if schedule == "linear" else 1 - np.cos(np.pi / 2 * times)
    slope = np.ones(4) if schedule == "linear" else np.pi / 2 * np.sin(np.pi / 2 * times)
    exact, rate = 1 - masked[1:] / masked[:-1], (times[:-1] - times[1:]) * slope[:-1] / masked[:-1]
    factors = (exact if sampler == "analytic" else rate).tolist()
    counts = texts(scores(probability, uneven), ScoreEntropy(3, AXES + 1, noise_schedule=schedule), 12000, sampler=sampler, steps=steps)
    assert chi_square_excess(counts, law(probability, factors, uneven).ravel()) < BOUND_1E4
    assert chi_square_excess(counts, law(probability, factors, one).ravel()) > 2 * BOUND_1E4


def test_score_samplers_need_scores() -> None:
    for objective in (MaskedDiffusion(WORDS, 8), BlockDiffusion(WORDS, 8, 4)):
        for sampler in ("analytic", "euler"):
            with pytest.raises(RecipeError, match=r"objective\.kind=sedd") as refused:
                sample(Table(scrambled), objective, [[]], 8, sampler=sampler)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("sampler", ["analytic", "euler"])
def test_scores_that_are_no_numbers_are_an_error(sampler: str) -> None:
    network = Table(lambda query, positions, tokens: torch.full((len(tokens), WORDS + 1), torch.nan))
    with pytest.raises(CheckpointError, match="not finite"):
        sample(network, ScoreEntropy(WORDS, 8), [[]], 8, sampler=sampler, steps=3)


def test_scores_beyond_measure_reveal_everything_at_once() -> None:
    """A is then infinite and a token is as good as any other of the largest scores."""
    network = Table(lambda query, positions, tokens: scrambled(query, positions, tokens) + 800)
    result = sample(network, ScoreEntropy(WORDS, 8), [[]], 8, sampler="analytic", steps=9)
    assert result.nfe == 1 and result.tokens[0].max() < WORDS


# -- What the network is told ------------------------------------------------------------------------------------------


def probabilities(network: Table) -> np.ndarray:
    """Mask probability of every call and row, from what was told: [calls, rows]."""
    return (1 - np.exp(-np.array(network.told))) / 0.999


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_stepping_samplers_tell_the_time_of_each_step(schedule: str) -> None:
    network, steps = Table(lambda query, positions, tokens: scrambled(query, positions, tokens) - 9), 5  # nothing before the last
    sample(network, ScoreEntropy(WORDS, 8, noise_schedule=schedule), [[]] * 40, 8, sampler="analytic", steps=steps)
    times = 1 - np.arange(steps) / steps
    expected = times if schedule == "linear" else 1 - np.cos(np.pi / 2 * times)
    np.testing.assert_allclose(probabilities(network), np.repeat(expected[:, None], 40, 1), rtol=1e-5)


def test_ancestral_rows_are_told_the_step_that_reveals_something() -> None:
    network, steps = Table(scrambled), 6
    sample(network, ScoreEntropy(WORDS, 4), [[]] * 50, 4, sampler="ancestral", steps=steps)
    told = probabilities(network)
    np.testing.assert_allclose(told * steps, np.round(told * steps), atol=1e-4)
    for row in told.T:
        kept = row[row > 1e-6]
        assert (np.diff(kept) < 0).all() and len(kept) >= 1


def test_first_hits_are_told_when_they_happen() -> None:
    """n masked tokens: the first is revealed where the mask probability p is the largest of n uniforms (p^n uniform), and p falls."""
    rows, length = 5000, 4
    network = Table(lambda query, positions, tokens: torch.zeros(len(tokens), WORDS + 1).index_fill(1, torch.tensor([WORDS]), -torch.inf))
    sample(network, ScoreEntropy(WORDS, length), [[]] * rows, length)
    told = probabilities(network)
    assert told.shape == (length - 1, rows) and (np.diff(told, axis=0) < 0).all()
    counts = np.histogram(told[0] ** (length - 1), 20, (0, 1))[0].astype(float)
    assert chi_square_excess(counts, np.full(20, 1 / 20)) < BOUND_1E4


def test_networks_that_are_not_timed_are_told_nothing() -> None:
    network = Table(scrambled)
    sample(network, MaskedDiffusion(WORDS, 8), [[]], 20)
    assert network.calls and not network.told


# -- Every sampler of every objective ----------------------------------------------------------------------------------

OBJECTIVES: dict[str, Objective] = {
    "ar": Autoregressive(WORDS, 8),
    "bd3": BlockDiffusion(WORDS, 8, 4),
    "bd3 of 1": BlockDiffusion(WORDS, 8, 1),
    "bd3 of L": BlockDiffusion(WORDS, 8, 8),
    "mdlm": MaskedDiffusion(WORDS, 8),
    "sedd": ScoreEntropy(WORDS, 8),
}
SAMPLERS: list[dict[str, Any]] = [
    {},
    {"sampler": "confidence", "threshold": 0.3},
    {"sampler": "remasking", "steps": 3},
    *({"sampler": sampler, "steps": steps} for sampler in ("ancestral", "analytic", "euler") for steps in (1, 2, 3, 7, 50)),
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_mask_is_left_and_every_call_is_counted(name: str) -> None:
    """At any T, at lengths inside the context and beyond, with prompts; a hook on the network counts its calls."""
    objective, tried = OBJECTIVES[name], 0
    for options, length in itertools.product(SAMPLERS, (6, 8, 21)):
        network = Counted(Table(scrambled))
        try:
            result = sample(network, objective, [[], [1, 2, 3], [4] * 5], length, **options)
        except RecipeError:
            assert name == "ar" or (name != "sedd" and options["sampler"] in ("analytic", "euler"))
            continue
        assert result.nfe == network.calls == network.network.calls > 0
        assert all(len(row) == length and row.min() >= 0 and row.max() < WORDS for row in result.tokens)
        tried += 1
    assert tried == 3 * {"ar": 1, "sedd": len(SAMPLERS)}.get(name, len(SAMPLERS) - 10)
