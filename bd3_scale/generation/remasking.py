"""Remasking: a block that is full is looked over again, its least sure tokens masked and drawn once more, given all others.

The block is first denoised as by ancestral sampling in T steps. Then come C calls ("corrections"), each of which masks the
tokens of the block that were the least probable when they were drawn, as many as a step reveals on the average and at most half, and draws
them anew, all at once (after LLaDA's low-confidence remasking, Nie et al. 2025, and the corrector phase of ReMDM, Wang et al. 2025).
Tokens that were drawn early, or together with others that they should have known, so meet the whole block.

Invariants: only what was drawn in this block is ever masked again, neither the prompt nor a finished block; a row with anything to correct
takes C further calls, whatever the others need; C = 0 is ancestral sampling; a row's tokens depend on (seed, row index, block,
correction) and on its own logits. The law of the texts is not the network's: who is sure stays, so that texts become more typical.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bd3_scale.generation.token_sampling import SamplingOptions, keyed_uniforms
from bd3_scale.generation.unmasking import UnmaskingPolicy
from bd3_scale.objectives.noise import Schedule


class RemaskingPolicy(UnmaskingPolicy):
    """The choices of one call, as of `UnmaskingPolicy`."""

    whole_blocks = True  # what lies beyond the end of the text is seen by the corrections

    def __init__(self, options: SamplingOptions, block_size: int, schedule: Schedule, seed: int, rows: range) -> None:
        super().__init__(options, block_size, schedule, seed, rows)
        self.corrections = self.steps if options.corrections is None else options.corrections
        self._drawn = np.zeros((len(rows), block_size), bool)
        self._confidence, self._corrected = np.zeros(self._drawn.shape), np.zeros(len(rows), np.int64)

    def begin_block(self, block: int, masked: np.ndarray) -> None:
        super().begin_block(block, masked)
        self._drawn, self._confidence = masked.copy(), np.zeros(masked.shape)
        self._corrected = np.zeros(len(masked), np.int64)

    def draw(self, logits: Tensor, revealed: np.ndarray) -> np.ndarray:
        tokens = super().draw(logits, revealed)
        chosen = logits.flatten(0, 1)[torch.from_numpy(np.flatnonzero(revealed)).to(logits.device)].float()
        of_tokens = chosen.gather(1, torch.from_numpy(tokens)[:, None].to(logits.device))[:, 0] - chosen.logsumexp(-1)
        self._confidence[revealed] = of_tokens.cpu().numpy()
        return tokens

    def remask(self, masked: np.ndarray) -> np.ndarray:
        count = self._drawn.sum(1)
        count = np.minimum(-(-count // self.steps), count // 2)
        due = ~masked.any(1) & (self._corrected < self.corrections) & (count > 0)
        order = np.where(self._drawn, self._confidence, np.inf).argsort(1, kind="stable").argsort(1)
        again = due[:, None] & (order < count[:, None])
        for row in np.flatnonzero(due):
            which = int(self._corrected[row])
            self._uniforms[row] = keyed_uniforms(self.seed, "correction", [self.rows[row]], self._block, masked.shape[1], which)[0]
        self._corrected += due
        self._reveal_at[again] = 1.0 - np.broadcast_to(again.mean(1)[:, None], again.shape)[again]  # all at once; see `noise`
        return again
