"""The learning rate as a pure function of the step and the budget: linear warm-up, then constant, cosine or wsd.

wsd stays constant until the last `decay` steps, which fall as 1 - sqrt (Hägele et al. 2024, arXiv 2405.18392): nothing before them depends
on the budget, so that a decay can be started from any checkpoint.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bd3_scale.recipe.objective_kinds import block_sizes
from bd3_scale.recipe.schema import TrainingConfig

if TYPE_CHECKING:
    from bd3_scale.recipe import Recipe


def rate_of(recipe: Recipe, step: int) -> float:
    """Rate of the update that makes step `step` into `step + 1` (0 for the first)."""
    changes = [change for change, _ in block_sizes(recipe.objective.block_size)[1:] if change <= step]
    warm = min(1.0, (step - changes[-1] + 1) / recipe.training.rewarmup) if changes and recipe.training.rewarmup else 1.0
    return warm * learning_rate(recipe.training, step, recipe.total_steps)


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """The same where the block size never changed."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "wsd":
        progress = min(1.0, max(0.0, (step - (total_steps - config.decay)) / max(1, config.decay)))
        falling = 1 - math.sqrt(progress)
    else:
        progress = min(1.0, (step - config.warmup) / max(1, total_steps - config.warmup))
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * falling)
