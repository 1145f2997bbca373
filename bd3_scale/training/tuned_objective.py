"""The objective of every update: the recipe's, with the block size of its stage, drawn from the interval that was tuned so far.

Invariants: whoever asks changes nothing (the thread of the feed asks, too); the state of the tuner is replaced here and nowhere else, on
all ranks alike, and goes into every checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.objectives.interval_tuner import Choice, Interval, TunerState
from bd3_scale.objectives.table import Objective, ObjectiveSchedule
from bd3_scale.recipe import Recipe


class TunedObjective:
    """Owns `tuning`, the state of the tuner."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, device: str, tuning: TunerState) -> None:
        """`device`: cpu | cuda."""
        self.recipe, self.tuning = recipe, tuning
        self.schedule = ObjectiveSchedule.of(recipe, tokenizer.mask_id, tokenizer.end_of_text, device)

    def at(self, step: int) -> Objective:
        """The objective of update `step` as far as is known now."""
        return self.schedule.at(step, self._tuning_at(step).interval)

    def advance(self, step: int) -> bool:
        """The run is at `step`. Whether another block size begins there, whose interval is searched anew."""
        before, self.tuning = self.tuning.block_size, self._tuning_at(step)
        return self.tuning.block_size != before

    def draw_from(self, interval: Interval) -> bool:
        """Train on `interval` from now on; whether that is another one."""
        before, self.tuning = self.tuning.interval, replace(self.tuning, interval=interval)
        return interval != before

    def take(self, choice: Choice, step: int) -> bool:
        """Train on what was chosen after `step` updates, and remember it; whether that is another interval."""
        before, self.tuning = self.tuning.interval, self.tuning.after(step, choice)
        return choice.interval != before

    def _tuning_at(self, step: int) -> TunerState:
        return self.tuning.at(self.schedule.at(step).block_size, self.recipe.objective.interval)
