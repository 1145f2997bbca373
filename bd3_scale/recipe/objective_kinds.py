"""The kinds of objectives by what sets them apart in a recipe, and what `objective.block_size` may be."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from bd3_scale.errors import RecipeError

ONE_BLOCK = ("mdlm", "sedd")
"""Kinds whose rows are one block: L' = L."""
IN_BLOCKS = ("bd3", "ssdlm")
"""Kinds whose rows are [x_t ; x_0], cut into blocks of `block_size`."""
EVERY_TOKEN = ("ar", "ssdlm")
"""Kinds that score every data token of a row, whatever the noise."""
ON_SIMPLEX = ("ssdlm",)
"""Kinds that noise vectors over all words instead of masking some."""
SELECTED_MULTIPLE = {"cpu": 1, "cuda": 256}
"""Selected positions are padded to a multiple of this: CUDA wants shapes that repeat."""
ROW_MULTIPLE = {"cpu": 1, "cuda": 128}
"""The clean half is only cut to a multiple of this: the tile of FlexAttention, and what matrix units like."""
DEFAULT_BLOCK_SIZE = 4
"""L' of bd3 and ssdlm where the recipe sets none."""


def block_sizes(value: Any) -> tuple[tuple[int, int], ...]:
    """`objective.block_size` as ((0, size), (from step, size), ...), steps ascending. Raises RecipeError for anything else."""
    if value is None:
        return ((0, DEFAULT_BLOCK_SIZE),)
    if _whole(value):
        return ((0, _positive(value)),)
    shape = "a whole number or a list of [from step, block size], such as [[0, 1024], [850000, 16]]"
    if not isinstance(value, (list, tuple)) or not value:
        raise RecipeError(f"objective.block_size is {value!r}; set {shape}")
    stages: list[tuple[int, int]] = []
    for stage in value:
        if not isinstance(stage, (list, tuple)) or len(stage) != 2 or not all(_whole(number) for number in stage):
            raise RecipeError(f"objective.block_size has the entry {stage!r}; set {shape}")
        stages.append((int(stage[0]), _positive(stage[1])))
    if stages[0][0] != 0:
        raise RecipeError(f"objective.block_size starts at step {stages[0][0]}, which leaves the steps before without one; start at step 0")
    for (earlier, _), (later, _) in pairwise(stages):
        if later <= earlier:
            raise RecipeError(f"objective.block_size has step {later} after step {earlier}; put the steps in ascending order")
    return tuple(stages)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(size: int) -> int:
    if size < 1:
        raise RecipeError(f"objective.block_size is {size}, but a block has at least one token; set 1 or more")
    return size
