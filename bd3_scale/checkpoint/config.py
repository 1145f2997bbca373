"""The `checkpoint` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CheckpointConfig:
    """When the state is saved and how much of it is kept."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep: int = 3
    """Newest checkpoints kept; older ones are deleted. 0 keeps all."""
