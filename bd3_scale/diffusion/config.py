"""The `objective` and `tuner` sections of a recipe, and what `objective.block_size` may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bd3_scale.recipe_stages import stages

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


@dataclass
class ObjectiveConfig:
    """What is trained. Source: Arriola et al. 2025 (arXiv 2503.09573), sections 3 and 4.

    A key that its kind does not use must be left out: a value that would do nothing is a RecipeError.
    """

    kind: str = "bd3"
    """bd3 (block diffusion) | mdlm (masked diffusion: one block, one stream) | sedd (as mdlm, by score entropy, with a network
    that is told the noise: needs model.conditioning=adaln) | ssdlm (SSD-LM, Han et al. 2022: blocks as bd3, Gaussian diffusion on
    the simplex of the words, told the time: needs adaln, too; it has no likelihood) | ar (the next-token loss)."""
    block_size: Any = None
    """L', tokens per block; divides model.context. Default 4. For bd3 and ssdlm (25 in its paper, which asks for a context such as
    1000; of 1024, 16 and 32 are near). Or its schedule over training: a list of [from step, block size], such as [[0, 1024],
    [850000, 16]]; the first starts at step 0."""
    interval: tuple[float, float] = (1e-3, 1.0)
    """[beta, omega]: training draws t ~ U[beta, omega]. Validation always uses U[1e-3, 1]. Not for ar."""
    clean_half: str = "block_causal"
    """How clean tokens see each other: block_causal | causal (inside a block, too). For bd3 and ssdlm."""
    schedule: str = "linear"
    """Mask probability over time t: linear | cosine | square | sqrt | log. `interval` bounds t. The reported NELBO is always
    linear. Not for ar, nor for ssdlm, whose Gaussian noise has a cosine schedule of its own."""
    resample: bool = False
    """Keep the *realised* masked fraction of a block, not only its t, inside `interval`. Training only. With omega < 1 the
    fully masked block is then never trained, although every block starts sampling in that state; and the expected train
    loss is no longer the bound over the interval. Not for ar and ssdlm, not for L' = 1."""


@dataclass
class TunerConfig:
    """The search for [beta, omega] during training (objective.md section 4), by the variance that validation sees."""

    enabled: bool = False
    """Off: objective.interval is never changed. On: it is where the search starts, and must be one of the candidates."""
    every: int = 5000
    """Steps between tunings; each takes a validation pass on the averaged weights."""
    start_step: int = 5000
    """No tuning before this step: clipping lowers the variance but can raise the perplexity of young models."""
    margin: float = 0.02
    """The interval changes only where the variance falls by more than this fraction."""
    rows: int | None = None
    """The first so many held-out rows are used; default: all that validation uses."""


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
