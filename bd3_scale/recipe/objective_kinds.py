"""The kinds of objectives by what sets them apart in a recipe, and what `objective.block_size` may be."""

from __future__ import annotations

from typing import Any

from bd3_scale.recipe.stages import stages

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
    return stages(
        "objective.block_size",
        DEFAULT_BLOCK_SIZE if value is None else value,
        counted="step",
        number="block size",
        least="a block has at least one token",
        example="[[0, 1024], [850000, 16]]",
    )
