"""The objective of SSD-LM (`simplex` has the method): rows as [x_t ; x_0], every word of every noisy block scored alike.

Invariants: as in `table`, except that the validation loss is a mean cross-entropy at
t ~ U[1e-3, 1] and no bound of anything: it is reported under a name of its own, and neither perplexity nor tuner use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.objectives import noise
from bd3_scale.objectives.base import ObjectiveBase, block_pattern, check_padding
from bd3_scale.objectives.draws import NoisyRows
from bd3_scale.objectives.network_inputs import (
    BlockSamples,
    DataRows,
    NetworkInputs,
    block_losses,
    masked_counts,
    network_inputs,
)
from bd3_scale.objectives.simplex import SimplexNoise, conditioning_times
from bd3_scale.recipe.objective_kinds import KINDS, VALIDATION_INTERVAL, Kind
from bd3_scale.rules.objective import check_draws, checked_interval


@dataclass(frozen=True)
class SimplexDiffusion(ObjectiveBase):
    """SSD-LM: one t per block, the expected embedding of noised words in the noisy half, cross-entropy of all of them.

    Raises RecipeError when block size, interval or clean half cannot work.
    """

    traits: ClassVar[Kind] = KINDS["ssdlm"]

    mask_id: int
    context: int
    block_size: int
    interval: tuple[float, float] = VALIDATION_INTERVAL
    clean_half: str = "block_causal"
    pad_to: int = 1
    document_end: int | None = None
    row_multiple: int = 1
    draws: int = 1
    pattern: AttentionPattern = field(init=False)

    def __post_init__(self) -> None:
        check_padding(self.pad_to)
        check_draws(self.draws)
        object.__setattr__(self, "interval", checked_interval(self.interval))
        pattern = block_pattern(self.context, self.block_size, self.clean_half, self.document_end, self.row_multiple, self.draws)
        object.__setattr__(self, "pattern", pattern)

    def training_inputs(self, rows: np.ndarray, slots: np.ndarray, step: int, seed: int, global_batch: int) -> NetworkInputs:
        """As `Objective.training_inputs`: t ~ U[beta, omega], in strata as for the other kinds."""
        noisy = NoisyRows.of(slots, global_batch, self.draws)
        times = noise.block_times(seed, step, noisy.slots, noisy.batch, self.blocks, self.interval)
        keys = noise.simplex_keys(seed, step, noisy.slots, self.context)
        return self._inputs(rows, times, keys, noise.dropout_keys(seed, step, slots), self.pattern)

    def validation_inputs(self, rows: np.ndarray, row_indices: np.ndarray, seed: int) -> NetworkInputs:
        """As `Objective.validation_inputs`: t ~ U[1e-3, 1], weight 1."""
        times = noise.validation_times(seed, row_indices, self.blocks)
        keys = noise.validation_simplex_keys(seed, row_indices, self.context)
        return self._inputs(rows, times, keys, np.zeros(len(row_indices), np.int64), self.of_one_draw)

    def block_samples(self, inputs: NetworkInputs, nll: Tensor, row_indices: np.ndarray, seed: int) -> BlockSamples:
        """As `Objective.block_samples`; every counted token is scored."""
        times = noise.validation_times(seed, row_indices, self.blocks)
        return BlockSamples(times, block_losses(inputs, nll), masked_counts(inputs), inputs.denoised)

    def _inputs(
        self, rows: np.ndarray, times: np.ndarray, keys: np.ndarray, dropout_keys: np.ndarray, pattern: AttentionPattern
    ) -> NetworkInputs:
        """Rows [m, L], and for each of their draws, row after row, the times [m draws, B] and the keys of its noise [m draws, L]."""
        data = DataRows.of(rows, len(dropout_keys), pattern, self.mask_id)
        drawn, denoised = (np.repeat(of_rows, pattern.draws, axis=0) for of_rows in (data.tokens, data.denoised))
        scored, streams = np.flatnonzero(denoised), (len(data.tokens), pattern.scored_rows)
        made = network_inputs(
            drawn.reshape(streams),
            data,
            scored,
            drawn.ravel()[scored],
            np.ones(len(scored)),
            dropout_keys,
            pattern,
            self.pad_to,
        )
        of_positions = np.where(denoised, np.repeat(times, self.block_size, axis=1), 0.0)
        simplex = SimplexNoise.at(keys.reshape(streams), of_positions.reshape(streams))
        return replace(made, noise_levels=conditioning_times(times.reshape(len(data.tokens), pattern.draws * self.blocks)), simplex=simplex)
