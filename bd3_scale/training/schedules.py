"""What changes from update to update: the learning rate and the objective.

The rate is a pure function of the step and the budget: linear warm-up, then constant, cosine or wsd. wsd stays constant until the last
`decay` steps, which fall as 1 - sqrt (Hägele et al. 2024, arXiv 2405.18392): nothing before them depends on the budget, so that a decay
can be started from any checkpoint. The objective is the recipe's, with the block size of its stage, on the interval and density tuned
so far.

Invariants: whoever asks changes nothing (the thread of the feed asks, too); the state of the tuner is replaced here and nowhere else, on
all ranks alike, and goes into every checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import replace

from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.objectives.loss_profile import masked_nll
from bd3_scale.objectives.table import Objective, ObjectiveSchedule
from bd3_scale.objectives.time_density import time_density
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.objective_kinds import block_sizes
from bd3_scale.recipe.schema import TrainingConfig
from bd3_scale.tuning.density_tuner import choose_density
from bd3_scale.tuning.interval_tuner import Choice, Interval, IntervalStatistics, TunerState, choose


def rate_of(recipe: Recipe, step: int) -> float:
    """Rate of the update that makes step `step` into `step + 1` (0 for the first)."""
    changes = [change for change, _ in block_sizes(recipe.objective.block_size)[1:] if change <= step]
    warm = min(1.0, (step - changes[-1] + 1) / recipe.training.rewarmup) if changes and recipe.training.rewarmup else 1.0
    return warm * learning_rate(recipe.training, step, recipe.total_steps)


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """The same where the block size never changed."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    if config.learning_rate_schedule == "wsd":
        progress = min(1.0, max(0.0, (step - (total_steps - config.decay)) / max(1, config.decay)))
        falling = 1 - math.sqrt(progress)
    else:
        progress = min(1.0, (step - config.warmup) / max(1, total_steps - config.warmup))
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * falling)


class TunedObjective:
    """Owns `tuning`, the state of the tuner."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, device: str, tuning: TunerState) -> None:
        """`device`: cpu | cuda."""
        self.recipe, self.tuning = recipe, tuning
        self.schedule = ObjectiveSchedule.of(recipe, tokenizer.mask_id, tokenizer.end_of_text, device)

    def at(self, step: int) -> Objective:
        """The objective of update `step` as far as is known now."""
        return self._of_size(self.schedule.size_at(step))[0]

    def advance(self, step: int) -> bool:
        """The run is at `step`. Whether another block size begins there, whose interval is searched anew; those of a mixture are all
        there from the beginning."""
        before, (_, self.tuning) = self.tuning.block_size, self._of_size(self.schedule.size_at(step))
        return self.tuning.block_size != before and not self.tuning.others

    def in_use(self, step: int) -> list[tuple[float, Objective, TunerState]]:
        """Share of the updates, objective and tuning of the block size at `step`, or of all of a mixture, the largest share first."""
        found = []
        for size, share in (self.schedule.shares if self.tuning.others else {self.schedule.size_at(step): 1.0}).items():
            found.append((share, *self._of_size(size)))
        return found

    def draw_from(self, interval: Interval | None) -> None:
        """Train on `interval` (None: on those that were tuned) from now on, with the recipe's density."""
        others = tuple(replace(other, interval=interval or other.interval, density=()) for other in self.tuning.others)
        self.tuning = replace(self.tuning, interval=interval or self.tuning.interval, density=(), others=others)

    def choose(self, statistics: IntervalStatistics, block_size: int) -> Choice:
        """What a pass with `block_size` says of interval and density, those of the two that the recipe's tuner searches."""
        config, tuning = self.recipe.tuner, self._tuning_of(self.tuning, block_size)
        if config.kind == "density":
            choice = Choice(tuning.interval, statistics.variance_of(tuning.interval), False)
        else:
            choice = choose(statistics.intervals, statistics.variances, statistics.blocks, tuning.interval, config.margin)
        if self.recipe.tracking.control_variate:
            choice = replace(choice, masked_nll=masked_nll(statistics.counts))
        if config.kind == "interval":
            return choice
        objective, learned = self.recipe.objective, tuning.density if choice.interval == tuning.interval else ()
        current = time_density(choice.interval, objective.density, tuple(objective.density_shape or ()), learned)
        return replace(choice, density=choose_density(statistics.counts, tuning.block_size, current, learned, config.margin))

    def take(self, choice: Choice, step: int, block_size: int) -> bool:
        """Train with `block_size` on what was chosen after `step` updates, and remember it; whether that is another interval or density."""
        before = self._tuning_of(self.tuning, block_size)
        after = before.after(step, choice)
        self.tuning = self._tuning_of(after, self.tuning.block_size)
        return (after.interval, after.density) != (before.interval, before.density)

    def _of_size(self, size: int) -> tuple[Objective, TunerState]:
        tuning = self._tuning_of(self.tuning, self.schedule.of_size(size).block_size)
        return self.schedule.of_size(size, tuning.interval, learned=tuning.density, masked_nll=tuning.masked_nll), tuning

    def _tuning_of(self, state: TunerState, block_size: int) -> TunerState:
        return state.at(block_size, self.recipe.objective.interval)
