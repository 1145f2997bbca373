"""Random numbers as a pure function of (seed, purpose, indices): streams on the host, hashes on any device.

Layout of a stream: NumPy's Philox4x64 with
    key     = [seed, first 8 bytes (little-endian) of BLAKE2b("<purpose>/<number of indices>")],
    counter = [0, index 0, index 1, index 2]   (absent indices are 0),
so that a stream may take 2^64 draws of four words before it could meet a neighbour, and distinct (seed, purpose,
indices) never share one. Uniform numbers are the top 53 bits of the raw words: NumPy promises that the raw stream of a
bit generator never changes, but not what `Generator.random` or `permutation` make of it.

Large tensors of noise are made on the device by counter-based hashes (`hash32`, `normals`) whose keys come from these streams.
"""

from __future__ import annotations

import math
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

WORD = 2**64


@lru_cache(maxsize=256)
def _purpose_key(purpose: str, indices: int) -> int:
    return int.from_bytes(blake2b(f"{purpose}/{indices}".encode(), digest_size=8).digest(), "little")


def _philox(seed: int, purpose: str, indices: tuple[int, ...]) -> np.random.Philox:
    if len(indices) > 3:
        raise ValueError(f"noise for {purpose!r} takes at most 3 indices, got {len(indices)}")
    if not 0 <= seed < WORD or any(not 0 <= index < WORD for index in indices):
        raise ValueError(f"noise for {purpose!r} needs seed and indices in [0, 2^64), got seed {seed}, indices {indices}")
    key = np.array([seed, _purpose_key(purpose, len(indices))], np.uint64)
    counter = np.array([0, *indices, *([0] * (3 - len(indices)))], np.uint64)
    return np.random.Philox(key=key, counter=counter)


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """The stream of (seed, purpose, indices), from its beginning. At most three indices; all in [0, 2^64)."""
    return np.random.Generator(_philox(int(seed), purpose, tuple(int(index) for index in indices)))


def raw_words(seed: int, purpose: str, indices: tuple[int, ...], count: int) -> np.ndarray:
    """The first `count` raw words of a stream, uint64 [count]."""
    return _philox(seed, purpose, indices).random_raw(count)


def uniform(raw: np.ndarray) -> np.ndarray:
    """Raw words -> float64 in [0, 1), multiples of 2^-53."""
    return (raw >> np.uint64(11)) * 2.0**-53


def permutation(raw: np.ndarray) -> np.ndarray:
    """Raw words uint64 [n] -> a permutation of 0..n-1, int64 [n]: the order of the words.

    The index takes the low bits of each word, so keys differ and any sorting algorithm gives the same answer; 64 - log2(n)
    random bits are left, whose rare ties do not matter below some 2^30 elements.
    """
    bits = np.uint64((len(raw) - 1).bit_length())
    index = np.arange(len(raw), dtype=np.uint64)
    keys = np.sort(((raw >> bits) << bits) | index)
    return (keys & np.uint64((1 << int(bits)) - 1)).astype(np.int64)


def hash32(words: Tensor) -> Tensor:
    """A bijective mix with full avalanche of the low 32 bits of int64 `words`, elementwise on any device: for random numbers
    that are wanted in large tensors (dropout, the draw of a token), keyed by what the streams above give."""
    low = 0xFFFFFFFF
    words = words & low
    words = ((words ^ (words >> 16)) * 0x7FEB352D) & low
    words = ((words ^ (words >> 15)) * 0x846CA68B) & low
    return words ^ (words >> 16)


_GAMMA, _FIRST, _SECOND = (constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Of SplitMix64 (Steele, Lea, Flood 2014), as the int64 of the same bits: products of int64 tensors are modulo 2^64."""


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
