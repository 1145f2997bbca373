"""The inputs of the coming steps on one replica: rows, noise and layout are made by the loader's thread while the device computes.

Inputs of a later step are made with the objective that this step has as far as is known. A tuning may change its interval after
that; then they are made again when they are taken. Invariants: what is taken is a function of (seed, step, samples, objective) alone,
whoever made it and when; filler is scored nowhere; what goes wrong in the thread is raised where the step is taken; on CUDA everything
lies in pinned memory, so that the main thread starts copies and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bd3_scale.data.loader import MicroBatch
from bd3_scale.distributed.context_share import ContextShare
from bd3_scale.objectives.network_inputs import NetworkInputs, scored_rows
from bd3_scale.objectives.table import Objective, selected_multiple

if TYPE_CHECKING:
    from bd3_scale.data.open import Data
    from bd3_scale.distributed.layout import Layout
    from bd3_scale.recipe import Recipe


@dataclass(frozen=True)
class StepInputs:
    """What this rank computes in one step, one entry for each forward: a replica's rows, or its share of them."""

    objective: Objective
    micro_batches: list[MicroBatch]
    inputs: list[NetworkInputs]
    rows_tokens: int
    """Tokens that count in the rows of the whole global batch."""
    control: float
    """Of the sum of this replica's losses (see `objectives.control_variate`), on the first of its context ranks; 0 where there is none."""

    @property
    def tokens(self) -> int:
        """What the sum of all replicas' losses is divided by: tokens that count, of every draw; 1 where there are none."""
        return max(1, self.rows_tokens * self.objective.pattern.draws)


class Feed:
    """Inputs of steps in order, or after a jump; `close` ends the threads."""

    def __init__(
        self, recipe: Recipe, layout: Layout, data: Data, objective_at: Callable[[int], Objective], *, step: int, samples: int
    ) -> None:
        """`objective_at`: the objective of a step as far as is known now; also called by the thread. `step` and `samples`: where the run
        is, so many updates and rows."""
        self._seed, self._batches, self._objective_at, self._device = recipe.run.seed, recipe.batches, objective_at, layout.device
        pad_to = selected_multiple(recipe.parallel, layout.device.type)
        self._share = ContextShare(layout.context_rank, layout.context, pad_to, recipe.parallel.context_exchange == "ring")
        self._loader = data.loader(
            self._seed,
            global_batch=recipe.training.global_batch,
            micro_batch=recipe.parallel.micro_batch,
            draws=recipe.objective.draws,
            replica=layout.data_rank,
            replicas=layout.data,
            host=layout.replicas_of_this_host,
            prepare=self._prepare,
        )

    def take(self, step: int, samples: int) -> StepInputs:
        """The inputs of update `step`, whose rows come after `samples` rows of the run. Raises DataError where a row cannot be read or
        is none."""
        micro_batches, made = self._loader.take(samples)
        objective = self._objective_at(step)
        return made if made.objective == objective else self._make(objective, step, micro_batches, made.rows_tokens)

    def close(self) -> None:
        """End the threads, waiting for what is under way."""
        self._loader.close()

    def _prepare(self, samples: int, micro_batches: list[MicroBatch], tokens: int) -> StepInputs:
        step = self._batches.steps_for(samples)
        objective = self._objective_at(step)
        return self._make(objective, step, micro_batches, tokens)

    def _make(self, objective: Objective, step: int, micro_batches: list[MicroBatch], tokens: int) -> StepInputs:
        made, control = [], 0.0
        for batch in micro_batches:
            inputs = objective.training_inputs(batch.rows, batch.slots, step, self._seed, self._batches.rows_at(step))
            inputs = scored_rows(inputs, batch.real)
            made.append(self._share.of(inputs))
            control += objective.control(inputs, batch.real) if self._share.rank == 0 else 0.0
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):  # a thread begins on the first device, whose ranks are others
                made = [inputs.pinned() for inputs in made]
        return StepInputs(objective, micro_batches, made, tokens, control)
