"""The next-token loss, beside which the diffusion objectives are compared: same network, rows and denominators.

Invariants: as in `table`; targets are shifted, position i predicts token i + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.objectives import noise
from bd3_scale.objectives.base import ObjectiveBase, check_padding
from bd3_scale.objectives.network_inputs import (
    BlockSamples,
    DataRows,
    NetworkInputs,
    block_losses,
    masked_counts,
    network_inputs,
)
from bd3_scale.recipe.objective_kinds import KINDS, Kind
from bd3_scale.rules.objective import check_shape


@dataclass(frozen=True)
class Autoregressive(ObjectiveBase):
    """The next-token loss: x_0 under a causal mask, row i predicts token i + 1, weight 1. Its NELBO is the exact likelihood."""

    traits: ClassVar[Kind] = KINDS["ar"]
    block_size: ClassVar[int] = 1

    mask_id: int
    context: int
    pad_to: int = 1
    document_end: int | None = None
    pattern: AttentionPattern = field(init=False)

    def __post_init__(self) -> None:
        check_shape(self.context, self.block_size)
        check_padding(self.pad_to)
        object.__setattr__(self, "pattern", AttentionPattern("causal", self.context, 1, document_end=self.document_end))

    def training_inputs(self, rows: np.ndarray, slots: np.ndarray, step: int, seed: int, global_batch: int) -> NetworkInputs:
        """As `Objective.training_inputs`; the only noise is that of dropout."""
        return self._inputs(rows, noise.dropout_keys(seed, step, slots))

    def validation_inputs(self, rows: np.ndarray, row_indices: np.ndarray, seed: int) -> NetworkInputs:
        """As `Objective.validation_inputs`, without any noise."""
        return self._inputs(rows, np.zeros(len(row_indices), np.int64))

    def block_samples(self, inputs: NetworkInputs, nll: Tensor, row_indices: np.ndarray, seed: int) -> BlockSamples:
        """As `Objective.block_samples`: every token is a block with t = 1."""
        losses = block_losses(inputs, nll)
        return BlockSamples(np.ones_like(losses), losses, masked_counts(inputs), inputs.denoised)

    def _inputs(self, rows: np.ndarray, dropout_keys: np.ndarray) -> NetworkInputs:
        data = DataRows.of(rows, len(dropout_keys), self.pattern, self.mask_id)
        predicted = np.flatnonzero(data.denoised)  # never token 0, so that the position before it is of the same row
        weights = np.ones(len(predicted))
        targets = data.tokens.ravel()[predicted]
        return network_inputs(data.tokens, data, predicted - 1, targets, weights, dropout_keys, self.pattern, self.pad_to)
