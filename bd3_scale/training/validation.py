"""NELBO on the held-out rows with fixed noise and the averaged weights, with its standard error.

An objective without a bound (ssdlm) has its cross-entropy instead, under that name and without a perplexity.

Invariants: t ~ U[1e-3, 1] and weight 1/t whatever training does (exact where L' = 1); the same rows and the same noise
every time, on every layout; each row counts once however the ranks share them, with as many tokens as it has that count. The same pass
feeds the interval tuner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from bd3_scale.data.loader import Rows, validation_rows
from bd3_scale.distributed.context_share import ContextShare
from bd3_scale.distributed.layout import Layout
from bd3_scale.errors import RecipeError
from bd3_scale.objectives.network_inputs import NetworkInputs, row_losses
from bd3_scale.objectives.table import Objective
from bd3_scale.rules.objective import interval_candidates
from bd3_scale.tuning.estimates import CrossEntropy, Validated, Validation, per_token, perplexity
from bd3_scale.tuning.interval_tuner import IntervalStatistics, interval_statistics, no_rows, row_statistics

Evaluate = Callable[[Sequence[NetworkInputs]], list[Tensor | None]]
Interrupted = Callable[[], bool]
EVALUATED_TOGETHER = 32
"""Micro-batches handed over at a time: enough to keep the stages of a pipeline busy, few enough to hold on the host."""


class Validator:
    """Holds this replica's share of the held-out rows. Every replica makes the same number of forwards, as ZeRO-3 needs."""

    def __init__(
        self,
        reader: Rows,
        layout: Layout,
        *,
        rows: int,
        micro_batch: int,
        seed: int,
        name: str = "data",
        pad_to: int = 1,
        ring: bool = False,
    ) -> None:
        """`name`: of the set, for errors. `pad_to` and `ring`: as in `ContextShare`."""
        self.share = ContextShare(layout.context_rank, layout.context, pad_to, ring)
        self.layout, self.micro_batch, self.seed = layout, micro_batch, seed
        self.total = min(rows, len(reader))
        if self.total < layout.data:
            raise RecipeError(
                f"validation.rows gives {self.total} held-out rows of {name} for {layout.data} data-parallel ranks, but each needs one; "
                f"set validation.rows={layout.data} or more, or prepare a larger held-out set"
            )
        self.indices, self.rows = validation_rows(reader, rows, layout.data_rank, layout.data)
        largest_share = math.ceil(self.total / layout.data)
        self.forwards = math.ceil(largest_share / micro_batch)

    def __call__(self, objective: Objective, evaluate: Evaluate, interrupted: Interrupted = lambda: False) -> Validated | None:
        """`evaluate`: micro-batches -> nll of the selected positions of each, None on ranks that do not score. `interrupted` is asked
        between groups of micro-batches, on all ranks alike, and ends a pass without a result."""
        return self._pass(objective, evaluate, interrupted, lambda inputs, nll, indices: None)

    def and_tune(
        self, objective: Objective, evaluate: Evaluate, interrupted: Interrupted = lambda: False, *, resample: bool, rows: int | None
    ) -> tuple[Validated | None, IntervalStatistics | None]:
        """The same pass, and the variance of every candidate interval from the first `rows` held-out rows; collective."""
        intervals = interval_candidates(objective.block_size)
        parts = [no_rows(intervals)]

        def collect(inputs: NetworkInputs, nll: Tensor, indices: np.ndarray) -> None:
            part = row_statistics(objective.block_samples(inputs, nll, indices, self.seed), indices, intervals, resample)
            parts.append(part.first(self.total if rows is None else rows))

        validation = self._pass(objective, evaluate, interrupted, collect)
        if validation is None:
            return None, None
        mine = parts if self.layout.reports_for_replica else parts[:1]
        return validation, interval_statistics([part for share in self.layout.all_gather(mine) for part in share])

    def _pass(
        self,
        objective: Objective,
        evaluate: Evaluate,
        interrupted: Interrupted,
        collect: Callable[[NetworkInputs, Tensor, np.ndarray], None],
    ) -> Validated | None:
        mine = [np.zeros((2, 0))]
        for first in range(0, self.forwards, EVALUATED_TOGETHER):
            if first and interrupted():
                return None
            parts = [self._part(index) for index in range(first, min(first + EVALUATED_TOGETHER, self.forwards))]
            # A share that is one row short joins the last forward with a row that is not counted.
            given = [part if len(part[0]) else (self.indices[:1], self.rows[:1]) for part in parts]
            inputs = [objective.validation_inputs(rows, indices, self.seed) for indices, rows in given]
            answers = evaluate([self.share.of(one) for one in inputs])
            for (indices, _), one, nll in zip(parts, inputs, answers, strict=True):
                if nll is not None and len(indices):
                    nll = self.layout.sum_of_context(self.share.joined(one, nll))
                    mine.append(np.stack([row_losses(one, nll), one.counted]))
                    collect(one, nll, indices)
        # Tensor and context peers have the answers for the same rows: one of them speaks for the replica.
        shares = self.layout.all_gather(np.concatenate(mine, 1) if self.layout.reports_for_replica else mine[0])
        mean, error = per_token(*np.concatenate(shares, 1))
        if not objective.traits.has_likelihood_bound:
            return CrossEntropy(mean, error, self.total)
        return Validation(mean, error, perplexity(mean), self.total)

    def _part(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        here = slice(index * self.micro_batch, (index + 1) * self.micro_batch)
        return self.indices[here], self.rows[here]
