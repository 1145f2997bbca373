"""A small recipe that is right, and what is said of it with overrides that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_scale import recipe as recipes
from bd3_scale.errors import RecipeError
from bd3_scale.rules.validate import validate

BASE = """
model: {context: 64, layers: 2, hidden: 32, heads: 4}
objective: {block_size: 8}
training: {steps: 20, global_batch: 8}
"""


def refused(path: Path, overrides: list[str], world_size: int = 1, device: str = "cpu") -> str:
    """The error's one line, of a recipe that must be refused."""
    with pytest.raises(RecipeError) as caught:
        validate(recipes.load(path, overrides), world_size, device)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    return message
