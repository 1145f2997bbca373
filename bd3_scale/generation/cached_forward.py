"""Forward passes for sampling, with or without a key/value cache, of texts that go on block by block together (`slots.py`: on their own).

With the cache a block's forwards run on its L' rows only and one more forward on the finished block stores its K and V; without,
every forward recomputes the whole prefix under the same mask. A block sees itself and the clean blocks that fit into the `context`
tokens that end with it, at any length.

Invariants: both ways give the same logits, to rounding; every call of the network is counted; the cache never holds more than
what a later row can see, and some blocks' room.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bd3_scale.attention.mask import decoding_mask
from bd3_scale.objectives.base import Objective
from bd3_scale.objectives.sedd import noise_levels
from bd3_scale.objectives.simplex import SimplexNoise, conditioning_times


class Cache(Protocol):
    """Rotated K and V of finished rows; see model.attention.KeyValueCache."""

    @property
    def length(self) -> int: ...

    def drop(self, count: int) -> None: ...


class Network(Protocol):
    """All that sampling knows of a network; see model.transformer.Transformer."""

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
        """tokens int64 [b, n], positions int64 [n], mask bool [n, cached + n] or None -> logits [b, last, V], -inf at MASK.

        `noise_levels` float32 [b], or [b, n]: for networks conditioned on the noise, and for no other. `simplex` [b, k]: noise on the
        words of the last k rows."""

    def new_cache(self, batch: int, capacity: int) -> Cache: ...


@dataclass(frozen=True)
class Request:
    """What a sampler asks of the network: positions [start, stop) of `tokens` int64 [B, width], given the clean ones before.

    `clean`: they are read for good, and logits of the `last` ones are wanted. Else they are a noisy block, of which all are, under the mask
    probability `noise` float64 [B], or with words that are noised by `simplex` to `time`.
    """

    tokens: np.ndarray
    start: int
    stop: int
    clean: bool = False
    last: int = 0
    noise: np.ndarray | None = None
    simplex: SimplexNoise | None = None
    time: float = 0.0


Steps = Generator[Request, Tensor, None]
"""A sampler at work: asks, and gets logits [B, wanted rows, V] sent."""


def one_block(objective: Objective) -> bool:
    """Whether its network denoises rows as a whole."""
    return objective.block_size == objective.pattern.length


class CachedForward:
    """The network with what it has read: runs rows after the clean ones before them, from the cache or all over again."""

    def __init__(self, network: Network, objective: Objective, width: int, rows: int, use_cache: bool, device: torch.device) -> None:
        self.network, self.device, self.nfe = network, device, 0
        self.one_block, self.noise_conditioned, pattern = one_block(objective), objective.traits.noise_conditioned, objective.pattern
        self.block_size, self.context = pattern.block_size, pattern.length
        self.causal, self.document_end = pattern.clean_half == "causal", pattern.document_end
        self.window = (self.context - 1) // self.block_size * self.block_size
        """Rows before its own block that a row sees."""
        # Room beyond the window: blocks that nobody sees any more are dropped many at a time.
        spare = max(1, self.context // 4 // self.block_size) * self.block_size
        self.capacity = min(width, self.window + spare)
        self.cache = network.new_cache(rows, self.capacity) if use_cache else None
        self.first = 0
        """Position of the oldest row in the cache."""

    def answer(self, request: Request) -> Tensor:
        block = slice(request.start, request.stop)
        if request.clean:
            return self.run(request.tokens, request.start, request.stop, clean=True, last=request.last)
        if request.simplex is not None:
            return self.project(request.tokens, block, request.simplex, request.time)
        assert request.noise is not None
        return self.denoise(request.tokens, block, request.noise)

    def run(self, tokens: np.ndarray, start: int, stop: int, *, clean: bool, last: int = 0, **noise: Any) -> Tensor:
        """Positions [start, stop) of int64 [B, width] given the clean ones before: logits [B, last, V] of the last rows.

        `clean` rows are read for good: later ones see them. Otherwise they are one noisy block. `noise`: further arguments of `decode`.
        """
        if self.cache is None:
            return self._forward(tokens, 0, stop, start if not clean else stop, False, last, **noise) if last else torch.empty(0)
        while True:
            part = min(stop - start, self.capacity - min(start, self.window)) if clean else stop - start
            if clean:
                self._make_room(start, part)
            final = start + part == stop
            logits = self._forward(tokens, start, start + part, start if not clean else stop, clean, last if final else 0, **noise)
            if final:
                return logits
            start += part

    def denoise(self, tokens: np.ndarray, block: slice, noise: np.ndarray) -> Tensor:
        """Logits [B, L', V] of one noisy block of int64 [B, width]; `noise`: mask probability of every row, float64 [B]."""
        if not self.one_block:
            return self.run(tokens, block.start, block.stop, clean=False, last=self.block_size)
        levels = noise_levels(noise).to(self.device) if self.noise_conditioned else None
        return self._window(tokens, block, noise_levels=levels)

    def project(self, tokens: np.ndarray, block: slice, noise: SimplexNoise, time: float) -> Tensor:
        """Logits [B, L', V] of one block of int64 [B, width], whose words are noised by `noise` [B, L'] to `time`."""
        simplex = noise.moved(lambda part: part.to(self.device))
        before = 0 if self.one_block or self.cache is not None else block.start  # clean rows of the same call, at time 0
        times = np.zeros((len(tokens), before + self.block_size))
        times[:, before:] = time
        levels = conditioning_times(times).to(self.device)
        if self.one_block:
            return self._window(tokens, block, noise_levels=levels, simplex=simplex)
        return self.run(tokens, block.start, block.stop, clean=False, last=self.block_size, noise_levels=levels, simplex=simplex)

    def _window(self, tokens: np.ndarray, block: slice, **noise: Any) -> Tensor:
        # Rows of one block are at the same positions wherever they lie in a longer text: as in training.
        self.nfe += 1
        return self.network.decode(
            torch.from_numpy(tokens[:, block].copy()).to(self.device),
            torch.arange(self.block_size, device=self.device),
            None,
            None,
            last=self.block_size,
            **noise,
        )

    def _make_room(self, start: int, rows: int) -> None:
        assert self.cache is not None
        unseen = start - self.window - self.first
        if unseen > 0 and self.cache.length + rows > self.capacity:
            self.cache.drop(unseen)
            self.first += unseen

    def _forward(self, tokens: np.ndarray, start: int, stop: int, noisy_from: int, commit: bool, last: int, **noise: Any) -> Tensor:
        positions = torch.arange(start, stop)
        seen = torch.arange(self.first if self.cache is not None else start, stop)
        mask = decoding_mask(positions, seen, self.block_size, self.context)
        if self.causal:  # inside a clean block, too; a noisy one sees itself whole
            mask &= (seen <= positions[:, None]) | (positions[:, None] >= noisy_from)
        if self.document_end is not None:
            segments = torch.from_numpy(segments_of(tokens[:, :stop], noisy_from, self.document_end))
            mask = mask & (segments[:, None, start:, None] == segments[:, None, None, stop - len(seen) :])
        self.nfe += 1
        return self.network.decode(
            torch.from_numpy(tokens[:, start:stop].copy()).to(self.device),
            positions.to(self.device),
            self.cache,
            None if bool(mask.all()) else mask.to(self.device),
            commit=commit,
            last=last,
            **noise,
        )


def segments_of(tokens: np.ndarray, noisy_from: int, document_end: int) -> np.ndarray:
    """int [B, stop]: the document of each position (`attention.mask.document_segments`); a noisy block's is the one before it."""
    ends = tokens == document_end
    ends[:, 0] = ends[:, noisy_from:] = False
    return np.cumsum(ends, axis=1)
