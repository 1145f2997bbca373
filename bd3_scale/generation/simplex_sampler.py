"""Words of a block by SSD-LM's decoding: from pure noise, T times a prediction, a word for every position, and less noise.

At time t of T equal steps the network predicts all words of the block from x_t; a word is drawn for every position from the
nucleus of its logits (the paper's sampling projection); its almost-one-hot logits, noised anew to the time before, are the next
x_t. After T predictions the words of the last are the block. Known words of a block (a prompt that ends inside it) are noised like
the drawn ones, which is what their positions were in training; they are never changed.

Invariants: a row's words depend on (seed, row index, block, step) and on its own logits, never on the batch; MASK is not drawn;
the network is called exactly T times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bd3_scale.generation.token_sampling import SamplingOptions, draw, keyed_uniforms, keyed_words
from bd3_scale.objectives.simplex import SimplexNoise


class SimplexSampler:
    """The choices of one call for rows `rows` of `seed`."""

    def __init__(self, options: SamplingOptions, block_size: int, seed: int, rows: range) -> None:
        self.options, self.seed, self.rows = options, seed, rows
        self.steps = options.steps or block_size

    def denoise(
        self, block: int, tokens: np.ndarray, known: np.ndarray, begins: bool, read: Callable[[SimplexNoise, float], Tensor]
    ) -> None:
        """Draw the words that are not `known` (bool [B, L']) in tokens int64 [B, L'], in place.

        `begins`: whether the first position is a row's first, which is never noised. `read` gives logits [B, L', V] of `tokens`
        under this noise at this time.
        """
        unknown = np.flatnonzero(~known)
        for step in range(self.steps):
            time = (self.steps - step) / self.steps
            times = np.full(tokens.shape, time)
            if begins:
                times[:, 0] = 0.0
            keys = keyed_words(self.seed, "simplex", self.rows, block, tokens.shape[1], step).view(np.int64)
            logits = read(SimplexNoise.at(keys, times), time).flatten(0, 1)
            uniforms = keyed_uniforms(self.seed, "token", self.rows, block, tokens.shape[1], step).ravel()[unknown]
            chosen = logits[torch.from_numpy(unknown).to(logits.device)]
            tokens[~known] = draw(chosen, torch.from_numpy(uniforms).to(logits.device), self.options).cpu().numpy()
