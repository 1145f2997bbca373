"""Which masked tokens of a block a forward reveals, and what they become.

First-hitting and ancestral sampling know the order beforehand: with mask probability p falling from 1 to 0, a token is
revealed at a p that is uniform in [0, 1]. First hitting reveals the tokens one by one as they come (Zheng et al. 2025; the
limit T -> infinity of ancestral sampling); ancestral sampling rounds to T steps, of which those that reveal nothing need no
forward. The confidence sampler asks the network. The analytic and Euler samplers of score entropy walk the T steps of the
objective's own schedule and ask the network at each how probable a token is to be revealed (see `sedd`); their
last step reveals what is left, whatever the scores say.

Invariants: a row's choices depend on (seed, row index, block) and on its own logits, never on the batch; after T steps of a
sampler that takes steps nothing of a block is masked.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bd3_scale.generation.token_sampling import (
    DEFAULT_THRESHOLD,
    REMASKING,
    SCORE_SAMPLERS,
    SamplingOptions,
    draw,
    keyed_uniforms,
    top_probabilities,
)
from bd3_scale.objectives.noise import Schedule
from bd3_scale.objectives.sedd import reveal_factor, total_scores


class UnmaskingPolicy:
    """The choices of one call for rows `rows` of `seed`; `begin_block`, then (`noise`, `reveal`, `draw`, `remask`) for each forward."""

    whole_blocks = False
    """Whether the last block is filled beyond the end of the text, too."""

    def __init__(self, options: SamplingOptions, block_size: int, schedule: Schedule, seed: int, rows: range) -> None:
        """`schedule`: the one that the score samplers walk down, that of the training."""
        self.options, self.block_size, self.schedule, self.seed, self.rows = options, block_size, schedule, seed, rows
        self.steps = options.steps or block_size
        self._reveal_at = self._uniforms = np.zeros((len(rows), block_size))
        self._block = self._done = 0

    def begin_block(self, block: int, masked: np.ndarray) -> None:
        """`masked`: bool [B, L']. Rows with nothing to reveal need no random numbers."""
        self._block, self._done = block, 0
        self._uniforms = self._keyed("token", masked)
        self._reveal_at = np.zeros(masked.shape)
        if self.options.sampler in ("first_hitting", "ancestral", REMASKING) and self.block_size > 1:
            self._reveal_at = self._keyed("order", masked)
        if self.options.sampler in ("ancestral", REMASKING):
            self._reveal_at = np.floor(self._reveal_at * self.steps) / self.steps

    def noise(self, masked: np.ndarray) -> np.ndarray:
        """Mask probability of every row at the coming forward: float64 [B]; bool [B, L'] are masked still."""
        if self.options.sampler in SCORE_SAMPLERS:
            return np.full(len(masked), self.schedule.mask_probability(np.asarray(self._time(self._done))))
        if self.options.sampler == "confidence":  # which has no time: what is masked of the block stands for it
            return masked.mean(1)
        return np.where(masked.any(1), 1.0 - np.where(masked, self._reveal_at, np.inf).min(1, initial=1.0), 0.0)

    def reveal(self, masked: np.ndarray, logits: Tensor) -> np.ndarray:
        """bool [B, L']; logits [B, L', V]. At least one of every row that has masked tokens, but for the score samplers."""
        if self.options.sampler in SCORE_SAMPLERS:
            return self._step(masked, logits)
        if self.options.sampler == "confidence":
            confidence = np.where(masked, top_probabilities(logits).cpu().numpy(), -1.0)
            threshold = DEFAULT_THRESHOLD if self.options.threshold is None else self.options.threshold
            most = np.arange(masked.shape[1]) == confidence.argmax(1)[:, None]
            return masked & ((confidence > threshold) | most)
        when = np.where(masked, self._reveal_at, np.inf)
        return masked & (when == when.min(1, keepdims=True))

    def draw(self, logits: Tensor, revealed: np.ndarray) -> np.ndarray:
        """A token for every revealed position, int64 in row-major order; logits [B, L', V]."""
        chosen = logits.flatten(0, 1)[torch.from_numpy(np.flatnonzero(revealed)).to(logits.device)]
        uniforms = torch.from_numpy(self._uniforms[revealed]).to(logits.device)
        return draw(chosen, uniforms, self.options).cpu().numpy()

    def remask(self, masked: np.ndarray) -> np.ndarray:
        """bool [B, L']: tokens that are to be masked again; bool [B, L'] are masked still. See `remasking`."""
        return np.zeros_like(masked)

    def _step(self, masked: np.ndarray, logits: Tensor) -> np.ndarray:
        uniforms = self._keyed("reveal", masked, self._done)
        time, earlier = self._time(self._done), self._time(self._done + 1)
        self._done += 1
        if self._done >= self.steps:
            return masked.copy()
        assert self.options.sampler is not None  # `generate` has resolved it
        factor = reveal_factor(self.options.sampler, self.schedule, time, earlier)
        return masked & (uniforms < factor * total_scores(logits).cpu().numpy())

    def _time(self, step: int) -> float:
        return (self.steps - step) / self.steps

    def _keyed(self, purpose: str, masked: np.ndarray, *step: int) -> np.ndarray:
        """Numbers of the rows that have masked tokens, float64 [B, L']; 0 for the others."""
        waiting = masked.any(1)
        uniforms = np.zeros(masked.shape)
        rows = [row for row, waits in zip(self.rows, waiting, strict=True) if waits]
        uniforms[waiting] = keyed_uniforms(self.seed, purpose, rows, self._block, masked.shape[1], *step)
        return uniforms
