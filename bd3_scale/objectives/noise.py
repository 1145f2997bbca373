"""Every random number that touches the data, as a pure function of (seed, purpose, indices).

Why: peers of one replica then draw the same noise without talking, and the noise of a sample depends neither on rank,
world size, micro-batch nor restarts. No generator is ever part of a run's state (objective.md section 3).

Layout: NumPy's Philox4x64 with
    key     = [seed, first 8 bytes (little-endian) of BLAKE2b("<purpose>/<number of indices>")],
    counter = [0, index 0, index 1, index 2]   (absent indices are 0),
so that a stream may take 2^64 draws of four words before it could meet a neighbour, and distinct (seed, purpose,
indices) never share one. Uniform numbers are the top 53 bits of the raw words: NumPy promises that the raw stream of a
bit generator never changes, but not what `Generator.random` or `permutation` make of it. Golden values are in
tests/golden/noise.json: a change here makes every older checkpoint resume as another run.

Purposes and indices in use here ("slot": row's position in its global batch; "row": index in the held-out set):
    strata (step); jitter, mask, mask count, dropout, simplex (step, slot); validation strata, validation jitter, validation mask,
    validation simplex (row); sampling token, sampling order (row, block); sampling reveal, sampling token, sampling simplex
    (row, block, step).
Large tensors of noise are made on the device by counter-based hashes (`hash32`, `normals`) whose keys come from these streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

VALIDATION_INTERVAL = (1e-3, 1.0)
"""The reported NELBO always draws t from here, whatever training does (objective.md section 1)."""

_WORD = 2**64


@lru_cache(maxsize=256)
def _purpose_key(purpose: str, indices: int) -> int:
    return int.from_bytes(blake2b(f"{purpose}/{indices}".encode(), digest_size=8).digest(), "little")


def _philox(seed: int, purpose: str, indices: tuple[int, ...]) -> np.random.Philox:
    if len(indices) > 3:
        raise ValueError(f"noise for {purpose!r} takes at most 3 indices, got {len(indices)}")
    if not 0 <= seed < _WORD or any(not 0 <= index < _WORD for index in indices):
        raise ValueError(f"noise for {purpose!r} needs seed and indices in [0, 2^64), got seed {seed}, indices {indices}")
    key = np.array([seed, _purpose_key(purpose, len(indices))], np.uint64)
    counter = np.array([0, *indices, *([0] * (3 - len(indices)))], np.uint64)
    return np.random.Philox(key=key, counter=counter)


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """The stream of (seed, purpose, indices), from its beginning. At most three indices; all in [0, 2^64)."""
    return np.random.Generator(_philox(int(seed), purpose, tuple(int(index) for index in indices)))


def _words(seed: int, purpose: str, indices: tuple[int, ...], count: int) -> np.ndarray:
    """The first `count` raw words of a stream, uint64 [count]."""
    return _philox(seed, purpose, indices).random_raw(count)


def _uniform(words: np.ndarray) -> np.ndarray:
    """Raw words -> float64 in [0, 1), multiples of 2^-53."""
    return (words >> np.uint64(11)) * 2.0**-53


def _permutation(words: np.ndarray) -> np.ndarray:
    """Raw words uint64 [n] -> a permutation of 0..n-1, int64 [n]: the order of the words.

    The index takes the low bits of each word, so keys differ and any sorting algorithm gives the same answer; 64 - log2(n)
    random bits are left, whose rare ties do not matter below some 2^30 elements.
    """
    bits = np.uint64((len(words) - 1).bit_length())
    index = np.arange(len(words), dtype=np.uint64)
    keys = np.sort(((words >> bits) << bits) | index)
    return (keys & np.uint64((1 << int(bits)) - 1)).astype(np.int64)


@lru_cache(maxsize=2)
def _strata(seed: int, step: int, count: int) -> np.ndarray:
    """The permutation of one step's strata; kept because every micro-batch of the step asks for its own part of it."""
    permutation = _permutation(_words(seed, "strata", (step,), count))
    permutation.flags.writeable = False
    return permutation


def _in_interval(position: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    """Positions in [0, 1] -> [beta, omega], never outside by rounding."""
    beta, omega = interval
    return np.clip(beta + (omega - beta) * position, beta, omega)


def _per_row(draw: Iterable[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Stack one array per row; also right for no rows at all."""
    values = list(draw)
    return np.stack(values) if values else np.zeros((rows, columns), np.uint64)


def block_times(seed: int, step: int, slots: np.ndarray, global_batch: int, blocks: int, interval: tuple[float, float]) -> np.ndarray:
    """t of every block of the given slots, float64 [m, blocks] in [beta, omega].

    The interval is cut into global_batch * blocks strata, and a permutation keyed by (seed, step) hands each of them to
    exactly one block of one slot; the place inside the stratum is keyed by (seed, step, slot). The marginal of t is
    therefore uniform for every slot and every block position, and depends on no other slot asked for.

    `slots`: int64 [m], each in [0, global_batch). Raises ValueError for a slot outside.
    """
    slots = np.asarray(slots, np.int64)
    if slots.size and not (slots.min() >= 0 and slots.max() < global_batch):
        raise ValueError(f"slots must lie in [0, {global_batch}), got {slots.min()}..{slots.max()}")
    count = global_batch * blocks
    stratum = _strata(int(seed), int(step), count).reshape(global_batch, blocks)[slots]
    words = _per_row((_words(seed, "jitter", (step, int(slot)), blocks) for slot in slots), len(slots), blocks)
    return _in_interval((stratum + _uniform(words)) / count, interval)


def masked_tokens(seed: int, step: int, slots: np.ndarray, probabilities: np.ndarray, block_size: int) -> np.ndarray:
    """Which tokens are masked, bool [m, blocks * block_size]: u < mask probability of the token's block.

    `probabilities`: float64 [m, blocks] (with the linear schedule this is t itself). Probability 1 masks every token.
    Token 0 of a row is never masked: nothing precedes it that could predict it.
    """
    return _masked(seed, "mask", [(step, int(slot)) for slot in slots], probabilities, block_size)


def _masked(seed: int, purpose: str, keys: list[tuple[int, ...]], probabilities: np.ndarray, block_size: int) -> np.ndarray:
    length = probabilities.shape[1] * block_size
    words = _per_row((_words(seed, purpose, key, length) for key in keys), len(keys), length)
    masked = _uniform(words) < np.repeat(probabilities, block_size, axis=1)
    masked[:, 0] = False
    return masked


def count_uniforms(seed: int, step: int, slots: np.ndarray, blocks: int) -> np.ndarray:
    """One number in [0, 1) for every block, float64 [m, blocks], from which a masked count can be made."""
    words = _per_row((_words(seed, "mask count", (step, int(slot)), blocks) for slot in slots), len(slots), blocks)
    return _uniform(words)


def masked_subsets(seed: int, step: int, slots: np.ndarray, counts: np.ndarray, block_size: int) -> np.ndarray:
    """Which tokens are masked where their number is given, bool [m, blocks * block_size]: those with the smallest words.

    `counts`: int64 [m, blocks], at most block_size, one less in the first block: token 0 of a row is never masked. Every
    subset of a size is equally probable. The words are those of `masked_tokens`, of which only one is used in a step.
    """
    blocks = counts.shape[1]
    words = _per_row((_words(seed, "mask", (step, int(slot)), blocks * block_size) for slot in slots), len(slots), blocks * block_size)
    words[:, 0] = _WORD - 1
    order = np.argsort(words.reshape(-1, blocks, block_size), axis=-1, kind="stable")
    masked = np.empty(order.shape, bool)
    np.put_along_axis(masked, order, np.arange(block_size) < counts[..., None], axis=-1)
    return masked.reshape(-1, blocks * block_size)


def dropout_keys(seed: int, step: int, slots: np.ndarray) -> np.ndarray:
    """Seeds for the dropout of each row, int64 [m] in [0, 2^32)."""
    words = [int(_words(seed, "dropout", (step, int(slot)), 1)[0]) >> 32 for slot in slots]
    return np.array(words, np.int64)


def validation_times(seed: int, row_indices: np.ndarray, blocks: int, interval: tuple[float, float] = VALIDATION_INTERVAL) -> np.ndarray:
    """t of every block of the given held-out rows, float64 [m, blocks]: fixed for ever by (seed, row index).

    Stratified inside the row, whose blocks get its `blocks` strata in an order of its own; rows are independent, so that
    the standard error over rows is honest. `row_indices`: int64 [m], non-negative.
    """
    rows = [int(row) for row in row_indices]
    stratum = [_permutation(_words(seed, "validation strata", (row,), blocks)) for row in rows]
    words = _per_row((_words(seed, "validation jitter", (row,), blocks) for row in rows), len(rows), blocks)
    return _in_interval((_per_row(stratum, len(rows), blocks) + _uniform(words)) / blocks, interval)


def validation_masked_tokens(seed: int, row_indices: np.ndarray, probabilities: np.ndarray, block_size: int) -> np.ndarray:
    """As `masked_tokens`, for held-out rows: bool [m, blocks * block_size], fixed for ever by (seed, row index)."""
    return _masked(seed, "validation mask", [(int(row),) for row in row_indices], probabilities, block_size)


def hash32(words: Tensor) -> Tensor:
    """A bijective mix with full avalanche of the low 32 bits of int64 `words`, elementwise on any device: for random numbers
    that are wanted in large tensors (dropout, the draw of a token), keyed by what the streams above give."""
    low = 0xFFFFFFFF
    words = words & low
    words = ((words ^ (words >> 16)) * 0x7FEB352D) & low
    words = ((words ^ (words >> 15)) * 0x846CA68B) & low
    return words ^ (words >> 16)


# -- Gaussian noise on words ------------------------------------------------------------------------------------------

_GAMMA, _FIRST, _SECOND = (constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Of SplitMix64 (Steele, Lea, Flood 2014), as the int64 of the same bits: products of int64 tensors are modulo 2^64."""


def simplex_keys(seed: int, step: int, slots: np.ndarray, length: int) -> np.ndarray:
    """Keys of the Gaussian noise of every position, int64 [m, length] (any 64 bits); see `normals`."""
    return _keys(seed, "simplex", [(step, int(slot)) for slot in slots], length)


def validation_simplex_keys(seed: int, row_indices: np.ndarray, length: int) -> np.ndarray:
    """As `simplex_keys`, for held-out rows: fixed for ever by (seed, row index)."""
    return _keys(seed, "validation simplex", [(int(row),) for row in row_indices], length)


def _keys(seed: int, purpose: str, indices: list[tuple[int, ...]], length: int) -> np.ndarray:
    return _per_row((_words(seed, purpose, index, length) for index in indices), len(indices), length).view(np.int64)


def normals(keys: Tensor, first: int, last: int) -> Tensor:
    """Standard normal numbers `first` to `last` - 1 of the endless row that each key has: int64 [n] -> fp32 [n, last - first].

    Numbers 2j and 2j + 1 are Box and Muller's of the two halves of word j of SplitMix64 seeded with the key, so that any part
    of a row can be made by itself, on any device. Tails reach to 6.6: the radius has 32 bits, relative to its own size.
    """
    pairs = torch.arange(first // 2, -(-last // 2), device=keys.device)
    words = keys[:, None] + (pairs + 1) * _GAMMA
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(factor)
    words.bitwise_xor_(_shifted(words, 31))
    made = torch.empty(*words.shape, 2, device=keys.device)
    radius = _shifted(words, 32).float().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = words.bitwise_and_(0xFFFFFFFF).float().mul_(2.0**-31 * math.pi)
    torch.mul(radius, angle.cos(), out=made[..., 0])
    torch.mul(radius, angle.sin_(), out=made[..., 1])
    return made.flatten(1)[:, first % 2 : first % 2 + last - first]


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64 `words`."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
