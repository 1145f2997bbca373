"""NELBO on the held-out rows with fixed noise and the averaged weights, with its standard error.

Invariants: t ~ U[1e-3, 1] and weight 1/t whatever training does (exact where L' = 1); the same rows and the same noise
every time, on every layout; each row counts once however the ranks share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bd3_scale.data.loader import validation_rows
from bd3_scale.data.shards import ShardReader
from bd3_scale.diffusion.likelihood import Moments, mean_and_standard_error, perplexity
from bd3_scale.diffusion.objectives import NetworkInputs, Objective, row_nelbo
from bd3_scale.errors import RecipeError
from bd3_scale.parallel.layout import Layout


@dataclass(frozen=True)
class Validation:
    """nats per data token, its standard error over rows, and exp of it."""

    nelbo: float
    standard_error: float
    perplexity: float
    rows: int


class Validator:
    """Holds this replica's share of the held-out rows. Every replica makes the same number of forwards, as ZeRO-3 needs."""

    def __init__(self, reader: ShardReader, objective: Objective, layout: Layout, *, rows: int, micro_batch: int, seed: int) -> None:
        self.objective, self.layout, self.micro_batch, self.seed = objective, layout, micro_batch, seed
        self.indices, self.rows = validation_rows(reader, rows, layout.data_rank, layout.data)
        self.total = min(rows, len(reader))
        if self.total < layout.data:
            raise RecipeError(
                f"validation.rows gives {self.total} held-out rows for {layout.data} data-parallel ranks, but each needs one; "
                f"set validation.rows={layout.data} or more, or prepare a larger held-out set"
            )
        largest_share = -(-self.total // layout.data)
        self.forwards = -(-largest_share // micro_batch)

    def __call__(self, evaluate: Callable[[NetworkInputs], Tensor]) -> Validation:
        """`evaluate`: NetworkInputs -> nll of its selected positions."""
        moments = Moments()
        for part in range(self.forwards):
            here = slice(part * self.micro_batch, (part + 1) * self.micro_batch)
            indices, rows = self.indices[here], self.rows[here]
            if len(indices) == 0:
                # A share that is one row short joins the last forward with a row that is not counted.
                evaluate(self.objective.validation_inputs(self.rows[:1], self.indices[:1], self.seed))
                continue
            inputs = self.objective.validation_inputs(rows, indices, self.seed)
            moments = moments + Moments.of(np.asarray(row_nelbo(inputs, evaluate(inputs))))
        # Tensor and pipeline peers hold the same rows: one of them speaks for the replica.
        speaks = self.layout.tensor_rank == 0 and self.layout.pipeline_rank == 0
        mean, error = mean_and_standard_error(self.layout.all_gather(moments if speaks else Moments()))
        return Validation(mean, error, perplexity(mean), self.total)
