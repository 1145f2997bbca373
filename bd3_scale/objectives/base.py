"""What training, evaluation and sampling ask of an objective, and the answers that most of them share.

Invariant: token 0 of a row is never counted, whatever the kind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Protocol, cast

import numpy as np
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.objectives.network_inputs import BlockSamples, NetworkInputs
from bd3_scale.recipe.objective_kinds import KINDS, Kind
from bd3_scale.rules.objective import check_clean_half, check_shape


class Objective(Protocol):
    """What the training loop, the evaluation, the sampler and the network need to know of an objective."""

    @property
    def traits(self) -> Kind:
        """What sets its kind apart: its row of `KINDS`."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""

    @property
    def block_size(self) -> int:
        """L': tokens that are generated at a time. 1 for ar, L for mdlm and sedd."""

    @property
    def noise_schedule(self) -> str:
        """Name of its noise schedule; linear for kinds that take none."""

    @property
    def pattern(self) -> AttentionPattern: ...

    @property
    def scored_tokens_per_row(self) -> int:
        """What a row of data whose tokens all count contributes to the denominator of training: all but token 0 of each of its draws."""

    def training_inputs(self, rows: np.ndarray, slots: np.ndarray, step: int, seed: int, global_batch: int) -> NetworkInputs:
        """Lay out rows int64 [m, L] that fill `slots` int64 [m] of step `step`'s global batch, which has `global_batch` rows of data.

        Raises DataError for a token that equals MASK or lies beyond it, ValueError for shapes that do not fit.
        """

    def validation_inputs(self, rows: np.ndarray, row_indices: np.ndarray, seed: int) -> NetworkInputs:
        """Lay out held-out rows int64 [m, L] with the noise that (seed, row index) fixes for ever; raises as `training_inputs`."""

    def block_samples(self, inputs: NetworkInputs, nll: Tensor, row_indices: np.ndarray, seed: int) -> BlockSamples:
        """What a validation pass says about single blocks: `inputs` of `validation_inputs` for these rows, and their nll [n]."""

    def control(self, inputs: NetworkInputs, real: int) -> float:
        """What the masks of `training_inputs` say of their summed loss, less what they say in the mean (see `control_variate`); only the
        first `real` rows are scored. 0 where nothing is known."""


class ObjectiveBase:
    """Answers shared by all objectives; a class names its kind's `traits`."""

    traits: ClassVar[Kind] = KINDS["bd3"]
    noise_schedule: str = "linear"

    context: int
    pattern: AttentionPattern

    @property
    def kind(self) -> str:
        """As `Objective.kind`."""
        return self.traits.name

    @property
    def blocks(self) -> int:
        """B = L / L', blocks per row."""
        return self.context // self.pattern.block_size

    @property
    def scored_tokens_per_row(self) -> int:
        """As `Objective.scored_tokens_per_row`."""
        return self.pattern.draws * (self.context - 1)

    @property
    def of_one_draw(self) -> AttentionPattern:
        """The pattern of validation, which draws once a row."""
        return replace(self.pattern, draws=1)

    def control(self, inputs: NetworkInputs, real: int) -> float:
        """As `Objective.control`: nothing is known."""
        return 0.0


def block_pattern(
    context: int, block_size: int, clean_half: str, document_end: int | None, row_multiple: int = 1, draws: int = 1
) -> AttentionPattern:
    """Who sees whom in rows of [x_t ; x_0], without the clean rows that no noisy row sees: all of them where L' = L, else those of the
    last block, unless the others are no multiple of `row_multiple`. Raises RecipeError for a block size or clean half that cannot work.
    """
    check_shape(context, block_size)
    check_clean_half(clean_half)
    if block_size == context:
        # Documents of a row are not kept apart inside of a block.
        return AttentionPattern("full", context, context, draws=draws)
    order = cast(Literal["block_causal", "causal"], clean_half)
    whole = (context - block_size) % row_multiple != 0
    return AttentionPattern("block_diffusion", context, block_size, order, document_end, last_clean=whole, draws=draws)


def check_padding(pad_to: int) -> None:
    """Raises ValueError unless the number of selected positions can be padded to a multiple of `pad_to`."""
    if pad_to < 1:
        raise ValueError(f"pad_to must be at least 1, got {pad_to}")
