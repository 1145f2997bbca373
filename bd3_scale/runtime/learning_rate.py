"""The learning rate as a pure function of the step: linear warm-up, then constant or cosine."""

from __future__ import annotations

import math

from bd3_scale.runtime.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Rate of the update that makes step `step` into `step + 1` (0 for the first)."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup) / max(1, total_steps - config.warmup))
    fraction = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * fraction
