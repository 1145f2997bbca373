"""The noise of rows: every random number that touches the data, and how probable a mask is at time t.

**Random numbers** are a pure function of (seed, purpose, indices). Why: peers of one replica then draw the same noise without talking, and
the noise of a sample depends neither on rank, world size, micro-batch nor restarts. No generator is ever part of a run's state
(docs/objective.md section 3). The streams are those of `keyed_random`. Golden values are in tests/golden/noise.json: a change here makes
every older checkpoint resume as another run.

Purposes and indices in use here ("slot": a draw's place in its global batch, see `draws`; "row": index in the held-out set):
    strata (step); jitter, mask, mask count, simplex (step, slot); dropout (step, row's place in the batch); validation strata,
    validation jitter, validation mask, validation simplex (row); sampling token, sampling order (row, block); sampling reveal,
    sampling token, sampling simplex (row, block, step).

**A schedule** has the mask probability 1 - alpha(t) and the weight that makes the loss a likelihood bound. With alpha(t) the probability
that a token is still clean, the bound of a block is (Arriola et al. 2025, eq. 8)
    E_t [ -alpha'(t) / (1 - alpha(t)) * sum over masked i of -log p(x_i | x_t^b, x^<b) ],   t ~ U[0, 1].
With p = 1 - alpha(t) as the variable the integrand is 1/p, so every schedule that rises from p(0) = 0 to p(1) = 1 has the same value; only
the variance of its estimate differs (section 4.2, table 8). Paper and code call sqrt "square root", log "logarithmic", linear "log-linear".
Training draws the *time* t ~ U[beta, omega], also for schedules where the mask probability is another number; the paper's clipped intervals
are those of the linear schedule, where the two are one. Reported NELBOs are always linear.

Invariants: mask_probability(1) is exactly 1, so that t = 1 masks everything; weight(t) = mask_probability'(t) / mask_probability(t). There
is no epsilon inside a schedule: the interval keeps t away from 0 where that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bd3_scale.keyed_random import WORD, permutation, raw_words, uniform
from bd3_scale.objectives.draws import reflected
from bd3_scale.recipe.objective_kinds import VALIDATION_INTERVAL
from bd3_scale.rules.objective import check_schedule

Function = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Schedule:
    """Both functions map float64 arrays of times to float64 arrays of the same shape; `weight` needs t > 0."""

    name: str
    mask_probability: Function
    """1 - alpha(t), rising from 0 at t = 0 to 1 at t = 1."""
    weight: Function
    """-alpha'(t) / (1 - alpha(t)): what each masked token's -log p is multiplied by."""


LINEAR = Schedule("linear", lambda t: t, lambda t: 1.0 / t)

SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        LINEAR,
        # 1 - cos(pi t / 2), written such that t = 1 gives exactly 1.
        Schedule("cosine", lambda t: 1.0 - np.sin(0.5 * np.pi * (1.0 - t)), lambda t: 0.5 * np.pi / np.tan(0.25 * np.pi * t)),
        Schedule("square", np.square, lambda t: 2.0 / t),
        Schedule("sqrt", np.sqrt, lambda t: 0.5 / t),
        Schedule("log", lambda t: np.log1p(t) / np.log1p(1.0), lambda t: 1.0 / ((1.0 + t) * np.log1p(t))),
    )
}
"""The formulas of `rules.objective.NOISE_SCHEDULES`."""


def schedule_named(name: str) -> Schedule:
    """Raises RecipeError for an unknown name."""
    check_schedule(name)
    return SCHEDULES[name]


@lru_cache(maxsize=2)
def _strata(seed: int, step: int, count: int) -> np.ndarray:
    """The permutation of one step's strata; kept because every micro-batch of the step asks for its own part of it."""
    strata = permutation(raw_words(seed, "strata", (step,), count))
    strata.flags.writeable = False
    return strata


def in_interval(position: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    """Positions in [0, 1] -> [beta, omega], never outside by rounding."""
    beta, omega = interval
    return np.clip(beta + (omega - beta) * position, beta, omega)


def _per_row(draw: Iterable[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Stack one array per row; also right for no rows at all."""
    values = list(draw)
    return np.stack(values) if values else np.zeros((rows, columns), np.uint64)


def _mirrored(words: np.ndarray, mirrored: np.ndarray | None) -> np.ndarray:
    """Words uint64 [m, n] of which some rows, bool [m], are to be those of 1 - u instead of u."""
    return words if mirrored is None else np.where(mirrored[:, None], ~words, words)


def block_times(
    seed: int,
    step: int,
    slots: np.ndarray,
    global_batch: int,
    blocks: int,
    interval: tuple[float, float],
    mirrored: np.ndarray | None = None,
    fold: float = 0.0,
) -> np.ndarray:
    """t of every block of the given slots, float64 [m, blocks] in [beta, omega].

    The interval is cut into global_batch * blocks strata, and a permutation keyed by (seed, step) hands each of them to
    exactly one block of one slot; the place inside the stratum is keyed by (seed, step, slot). The marginal of t is
    therefore uniform for every slot and every block position, and depends on no other slot asked for. Rows that are `mirrored`, bool [m],
    have the times of their slot reflected (see `draws`).

    `slots`: int64 [m], each in [0, global_batch). Raises ValueError for a slot outside.
    """
    slots = np.asarray(slots, np.int64)
    if slots.size and not (slots.min() >= 0 and slots.max() < global_batch):
        raise ValueError(f"slots must lie in [0, {global_batch}), got {slots.min()}..{slots.max()}")
    count = global_batch * blocks
    stratum = _strata(int(seed), int(step), count).reshape(global_batch, blocks)[slots]
    words = _per_row((raw_words(seed, "jitter", (step, int(slot)), blocks) for slot in slots), len(slots), blocks)
    positions = (stratum + uniform(words)) / count
    if mirrored is not None:
        positions = np.where(mirrored[:, None], reflected(positions, fold), positions)
    return in_interval(positions, interval)


def masked_tokens(
    seed: int, step: int, slots: np.ndarray, probabilities: np.ndarray, block_size: int, mirrored: np.ndarray | None = None
) -> np.ndarray:
    """Which tokens are masked, bool [m, blocks * block_size]: u < mask probability of the token's block.

    `probabilities`: float64 [m, blocks] (with the linear schedule this is t itself). Probability 1 masks every token.
    Token 0 of a row is never masked: nothing precedes it that could predict it. `mirrored`, bool [m]: rows with 1 - u for u.
    """
    return _masked(seed, "mask", [(step, int(slot)) for slot in slots], probabilities, block_size, mirrored)


def _masked(
    seed: int,
    purpose: str,
    keys: list[tuple[int, ...]],
    probabilities: np.ndarray,
    block_size: int,
    mirrored: np.ndarray | None = None,
) -> np.ndarray:
    length = probabilities.shape[1] * block_size
    words = _mirrored(_per_row((raw_words(seed, purpose, key, length) for key in keys), len(keys), length), mirrored)
    masked = uniform(words) < np.repeat(probabilities, block_size, axis=1)
    masked[:, 0] = False
    return masked


def count_uniforms(seed: int, step: int, slots: np.ndarray, blocks: int, mirrored: np.ndarray | None = None) -> np.ndarray:
    """One number in [0, 1) for every block, float64 [m, blocks], from which a masked count can be made."""
    words = _per_row((raw_words(seed, "mask count", (step, int(slot)), blocks) for slot in slots), len(slots), blocks)
    return uniform(_mirrored(words, mirrored))


def masked_subsets(
    seed: int,
    step: int,
    slots: np.ndarray,
    counts: np.ndarray,
    denoised: np.ndarray,
    block_size: int,
    mirrored: np.ndarray | None = None,
) -> np.ndarray:
    """Which tokens are masked where their number is given, bool [m, blocks * block_size]: those with the smallest words.

    `counts`: int64 [m, blocks], at most the tokens of the block that are `denoised`, bool [m, blocks * block_size]. Every
    subset of them of a size is equally probable. The words are those of `masked_tokens`, of which only one is used in a step.
    """
    blocks = counts.shape[1]
    words = _per_row((raw_words(seed, "mask", (step, int(slot)), blocks * block_size) for slot in slots), len(slots), blocks * block_size)
    words = np.where(denoised, _mirrored(words, mirrored), np.uint64(WORD - 1))
    order = np.argsort(words.reshape(-1, blocks, block_size), axis=-1, kind="stable")
    masked = np.empty(order.shape, bool)
    np.put_along_axis(masked, order, np.arange(block_size) < counts[..., None], axis=-1)
    return masked.reshape(-1, blocks * block_size)


def dropout_keys(seed: int, step: int, slots: np.ndarray) -> np.ndarray:
    """Seeds for the dropout of each row, int64 [m] in [0, 2^32)."""
    words = [int(raw_words(seed, "dropout", (step, int(slot)), 1)[0]) >> 32 for slot in slots]
    return np.array(words, np.int64)


def validation_times(seed: int, row_indices: np.ndarray, blocks: int, interval: tuple[float, float] = VALIDATION_INTERVAL) -> np.ndarray:
    """t of every block of the given held-out rows, float64 [m, blocks]: fixed for ever by (seed, row index).

    Stratified inside the row, whose blocks get its `blocks` strata in an order of its own; rows are independent, so that
    the standard error over rows is honest. `row_indices`: int64 [m], non-negative.
    """
    rows = [int(row) for row in row_indices]
    stratum = [permutation(raw_words(seed, "validation strata", (row,), blocks)) for row in rows]
    words = _per_row((raw_words(seed, "validation jitter", (row,), blocks) for row in rows), len(rows), blocks)
    return in_interval((_per_row(stratum, len(rows), blocks) + uniform(words)) / blocks, interval)


def validation_masked_tokens(seed: int, row_indices: np.ndarray, probabilities: np.ndarray, block_size: int) -> np.ndarray:
    """As `masked_tokens`, for held-out rows: bool [m, blocks * block_size], fixed for ever by (seed, row index)."""
    return _masked(seed, "validation mask", [(int(row),) for row in row_indices], probabilities, block_size)


# -- Gaussian noise on words ------------------------------------------------------------------------------------------


def simplex_keys(seed: int, step: int, slots: np.ndarray, length: int) -> np.ndarray:
    """Keys of the Gaussian noise of every position, int64 [m, length] (any 64 bits); see `normals`."""
    return _keys(seed, "simplex", [(step, int(slot)) for slot in slots], length)


def validation_simplex_keys(seed: int, row_indices: np.ndarray, length: int) -> np.ndarray:
    """As `simplex_keys`, for held-out rows: fixed for ever by (seed, row index)."""
    return _keys(seed, "validation simplex", [(int(row),) for row in row_indices], length)


def _keys(seed: int, purpose: str, indices: list[tuple[int, ...]], length: int) -> np.ndarray:
    return _per_row((raw_words(seed, purpose, index, length) for index in indices), len(indices), length).view(np.int64)
