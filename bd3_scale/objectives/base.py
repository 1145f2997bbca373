"""What the objectives have in common: the usual answers to what they are asked (see `objectives.Objective`), and the shape of their rows.

Invariant: token 0 of a row is never counted, whatever the kind.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

from bd3_scale.errors import RecipeError
from bd3_scale.objectives.attention_mask import AttentionPattern


class Traits:
    """Of a kind that predicts masked tokens in their own place with a network that is not told the time; others say what differs."""

    shifted: ClassVar[bool] = False
    timed: ClassVar[bool] = False
    normalised: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    simplex: ClassVar[bool] = False

    context: int
    pattern: AttentionPattern

    @property
    def blocks(self) -> int:
        """B = L / L', blocks per row."""
        return self.context // self.pattern.block_size

    @property
    def scored_tokens_per_row(self) -> int:
        """As `Objective.scored_tokens_per_row`."""
        return self.context - 1


def block_pattern(context: int, block_size: int, clean_half: str, document_end: int | None, row_multiple: int = 1) -> AttentionPattern:
    """Who sees whom in rows of [x_t ; x_0], without the clean rows that no noisy row sees: all of them where L' = L, else those of the
    last block, unless the others are no multiple of `row_multiple`. Raises RecipeError for a block size or clean half that cannot work.
    """
    if block_size < 1 or context % block_size:
        divisors = [size for size in range(1, context + 1) if context % size == 0]
        nearest = min(divisors, key=lambda size: abs(size - block_size))
        raise RecipeError(
            f"objective.block_size is {block_size} but must divide model.context = {context}, because a row is cut "
            f"into equal blocks; set it to {nearest}"
        )
    if clean_half not in ("block_causal", "causal"):
        raise RecipeError(f"objective.clean_half is {clean_half!r}; set block_causal or causal")
    if block_size == context:
        return AttentionPattern("full", context, context)  # documents of a row are not kept apart inside of a block
    order = cast(Literal["block_causal", "causal"], clean_half)
    whole = (context - block_size) % row_multiple != 0
    return AttentionPattern("block_diffusion", context, block_size, order, document_end, last_clean=whole)


def check_shape(context: int, pad_to: int) -> None:
    """What every objective needs. Raises RecipeError, ValueError for `pad_to`."""
    if context < 2:
        raise RecipeError(f"model.context is {context}, but token 0 is never scored; set it to 2 or more")
    if pad_to < 1:
        raise ValueError(f"pad_to must be at least 1, got {pad_to}")
