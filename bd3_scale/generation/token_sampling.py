"""From logits to tokens: temperature, nucleus, and a draw that is a function of (seed, row, position).

A token is drawn by an exponential race (Gumbel-max): the least E_v / p_v wins, where the exponential numbers E_v are keyed by one uniform
number of the position. `_gumbel_argmax` says why the distribution function is not inverted instead.

Invariants: a token of probability 0 (MASK above all) is never drawn; a row's random numbers depend on (seed, row index,
block) alone, never on the batch or on how many tokens were drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bd3_scale.errors import CheckpointError, RecipeError
from bd3_scale.keyed_random import generator, hash32

SCORE_SAMPLERS = ("analytic", "euler")
"""Those that need scores which are not normalised (sedd)."""
SIMPLEX = "simplex"
"""That of ssdlm, and of nothing else."""
REMASKING = "remasking"
"""That which looks a block over again."""
SAMPLERS = ("first_hitting", "ancestral", "confidence", REMASKING, *SCORE_SAMPLERS, SIMPLEX)
STEPPED = ("ancestral", REMASKING, *SCORE_SAMPLERS, SIMPLEX)
"""Those that take T steps."""
DEFAULT_THRESHOLD = 0.9
"""Of the confidence sampler."""
NO_NUMBERS = "the network's logits are not finite, so its weights are of no use; take an earlier checkpoint"
DRAWN_ELEMENTS = 1 << 22
"""Probabilities (float64) alive at a time while tokens are drawn."""


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. Raises RecipeError for values that cannot work and for values that would do nothing."""

    sampler: str | None = "first_hitting"
    """first_hitting (one token per forward, exact for T -> infinity) | ancestral (T steps) | confidence (several per forward) |
    remasking (T steps, then corrections) | analytic, euler (T steps, by the scores of sedd) | simplex (T steps, for ssdlm).
    None: that of the objective, which is simplex for ssdlm and first_hitting for all others."""
    steps: int | None = None
    """T, steps per block of the samplers that take steps. Default: L'."""
    threshold: float | None = None
    """Confidence sampler: every token whose top probability (of the network itself, before temperature and nucleus)
    exceeds it is revealed. Default 0.9."""
    corrections: int | None = None
    """Remasking sampler: further calls per block, each of which draws its least sure tokens anew. Default: T."""
    temperature: float = 1.0
    """Divides the logits. 0: always the most probable token."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens whose mass reaches it."""
    nucleus: str = "keep"
    """keep (the token that crosses top_p stays) | strict (it is dropped, as in the paper's code; the most probable stays)."""
    minimum_entropy: float | None = None
    """Nats. A row ends when the histogram of its last 256 generated tokens has less; the paper uses 4. None: never."""

    def __post_init__(self) -> None:
        if self.sampler not in (None, *SAMPLERS):
            raise RecipeError(f"sampler is {self.sampler!r}, which does not exist; set one of {', '.join(SAMPLERS)}")
        if self.steps is not None and self.sampler not in (None, *STEPPED):
            raise RecipeError(
                f"steps is {self.steps}, which means nothing to sampler {self.sampler}; leave it out or set sampler ancestral"
            )
        if self.threshold is not None and self.sampler not in (None, "confidence"):
            raise RecipeError(
                f"threshold is {self.threshold}, which means nothing to sampler {self.sampler}; leave it out or set sampler confidence"
            )
        if self.corrections is not None and self.sampler not in (None, REMASKING):
            raise RecipeError(
                f"corrections is {self.corrections}, which means nothing to sampler {self.sampler}; leave it out or set sampler remasking"
            )
        if self.corrections is not None and self.corrections < 0:
            raise RecipeError(f"corrections is {self.corrections} but must be at least 0; leave it out for as many as there are steps")
        if self.steps is not None and self.steps < 1:
            raise RecipeError(f"steps is {self.steps} but must be at least 1; leave it out for one step per token of a block")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise RecipeError(
                f"threshold is {self.threshold} but must lie in [0, 1], as a probability; set {DEFAULT_THRESHOLD}, for example"
            )
        if not 0 <= self.temperature < float("inf"):
            raise RecipeError(f"temperature is {self.temperature} but must be 0 or a positive number; set 1 for the model's distribution")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p is {self.top_p} but must lie in (0, 1]; set 1 for the whole distribution")
        if self.nucleus not in ("keep", "strict"):
            raise RecipeError(f"nucleus is {self.nucleus!r}; set keep or strict")
        if self.minimum_entropy is not None and not 0 <= self.minimum_entropy < float("inf"):
            raise RecipeError(f"minimum_entropy is {self.minimum_entropy} but must be 0 or a positive number; the paper uses 4 (nats)")


def keyed_words(seed: int, purpose: str, rows: Sequence[int], block: int, count: int, *step: int) -> np.ndarray:
    """`count` random words for this block of every row, uint64 [rows, count]: a function of (seed, purpose, row, block, step).

    Raw words, which NumPy promises never to change: a seed gives the same text under every version.
    """
    words = np.empty((len(rows), count), np.uint64)
    for place, row in enumerate(rows):
        words[place] = generator(seed, f"sampling {purpose}", row, block, *step).bit_generator.random_raw(count)
    return words


def keyed_uniforms(seed: int, purpose: str, rows: Sequence[int], block: int, count: int, *step: int) -> np.ndarray:
    """The same as numbers in [0, 1), float64 [rows, count]."""
    return (keyed_words(seed, purpose, rows, block, count, *step) >> np.uint64(11)) * 2.0**-53


def nucleus(probabilities: Tensor, top_p: float, strict: bool = False) -> Tensor:
    """Set the probabilities [n, V] outside the nucleus to 0, without normalising.

    Kept is the smallest set of most probable tokens whose mass reaches `top_p`; of equal ones those with smaller ids.
    `strict` keeps only tokens that do not carry the mass beyond `top_p`, but always the most probable.
    """
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    mass = ordered.cumsum(-1)
    # Strict: dropped is who carries the mass beyond top_p. Else: who comes when it has been reached already.
    outside = mass > top_p if strict else mass.roll(1, -1) >= top_p
    outside[..., 0] = False
    return probabilities.masked_fill(torch.zeros_like(outside).scatter(-1, ids, outside), 0.0)


def token_probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """What a token is drawn from: logits [n, V] -> float64 [n, V], not normalised, 0 where the logit is -inf.

    Raises CheckpointError for logits that are no numbers.
    """
    values = logits.double()
    highest = values.amax(-1, keepdim=True)
    if not bool(highest.isfinite().all()):
        raise CheckpointError(NO_NUMBERS)
    probabilities = ((values - highest) / options.temperature).softmax(-1)
    if options.top_p < 1:
        probabilities = nucleus(probabilities, options.top_p, options.nucleus == "strict")
    return probabilities


def draw(logits: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """One token per row: logits [n, V], uniforms float64 [n] in [0, 1) -> int64 [n]. Raises CheckpointError as above."""
    if options.temperature == 0:
        if not bool(logits.amax(-1).isfinite().all()):
            raise CheckpointError(NO_NUMBERS)
        return logits.argmax(-1)
    rows = max(1, DRAWN_ELEMENTS // logits.shape[-1])
    parts = zip(logits.split(rows), uniforms.split(rows), strict=True)
    return torch.cat([_gumbel_argmax(token_probabilities(part, options), numbers) for part, numbers in parts])


def _gumbel_argmax(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token v with the least E_v / p_v, where E_v are standard exponentials that each row's uniform is the key of.

    Why not invert the cumulative distribution: a rounding error of the logits moves each of V borders, and some draw in a
    few hundred falls between old and new; here it must meet a tie of the two first. Two forwards that differ by rounding
    (with the cache and without) so give the same text.
    """
    key = hash32((uniforms.double() * 2.0**32).long())[:, None]
    ids = torch.arange(probabilities.shape[-1], device=probabilities.device)
    words = hash32(key + hash32(ids + 1))
    exponentials = -torch.log((words.double() + 0.5) * 2.0**-32)
    return (exponentials / probabilities).argmin(-1)  # x / 0 = inf: never first


def top_probabilities(logits: Tensor) -> Tensor:
    """The network's probability of its most probable token: logits [..., V] -> fp32 [...]."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def histogram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the relative frequencies of int64 [n] tokens."""
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(share * np.log(share)).sum())
