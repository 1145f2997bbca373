"""What goes into the network, what is scored, and with which weight: the objectives' interface, their names, the next-token loss.

An objective lays rows of data tokens out as `NetworkInputs` on the host; the network answers with one negative
log-likelihood (nll; of `sedd` a score entropy, which bounds it) per selected position. Two numbers come of that and are never mixed:

    train loss = sum(weight * nll) / (global_batch * (L - 1)), over all ranks and micro-batches, at the training interval;
    NELBO      = the same quotient over the held-out rows at t ~ U[1e-3, 1], linear schedule, fixed noise: nats per data token.

`ssdlm` has no NELBO: its quotient over the held-out rows is a cross-entropy, and is called so.

Invariants: diffusion targets are not shifted (position i predicts token i), those of `ar` are (i predicts i + 1); one t
per block; token 0 of a row is never masked and never counted; division is by data tokens, never by masked ones; nothing
here depends on rank or micro-batch. An objective is a value without state: a run changes its block size or interval by
taking another one from `objective_at`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor

from bd3_scale.errors import RecipeError
from bd3_scale.objectives import noise
from bd3_scale.objectives.attention_mask import AttentionPattern
from bd3_scale.objectives.base import Traits, check_shape
from bd3_scale.objectives.bd3 import BlockDiffusion, MaskedDiffusion
from bd3_scale.objectives.network_inputs import (
    BlockSamples,
    NetworkInputs,
    block_losses,
    checked_rows,
    counted_tokens,
    masked_counts,
    network_inputs,
    row_nelbo,
)
from bd3_scale.objectives.sedd import ScoreEntropy
from bd3_scale.objectives.ssdlm import SimplexDiffusion
from bd3_scale.recipe.objective_kinds import block_sizes
from bd3_scale.recipe.schema import ObjectiveConfig

__all__ = [
    "Autoregressive",
    "BlockDiffusion",
    "MaskedDiffusion",
    "NetworkInputs",
    "Objective",
    "ScoreEntropy",
    "SimplexDiffusion",
    "build_objective",
    "objective_at",
    "row_nelbo",
]


class Objective(Protocol):
    """What the training loop, the evaluation, the sampler and the network need to know of an objective."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""

    @property
    def block_size(self) -> int:
        """L': tokens that are generated at a time. 1 for ar, L for mdlm and sedd."""

    @property
    def shifted(self) -> bool:
        """Whether the logits of row i predict token i + 1 (else token i)."""

    @property
    def timed(self) -> bool:
        """Whether the network is told how noisy its input is (`NetworkInputs.noise_levels`); it then needs model.conditioning."""

    @property
    def normalised(self) -> bool:
        """Whether the softmax of the logits are probabilities; else exp of the logits are scores, up to a known factor."""

    @property
    def bounded(self) -> bool:
        """Whether the validation loss is, or bounds, the negative log-likelihood; else it is a cross-entropy that is only comparable
        with itself."""

    @property
    def simplex(self) -> bool:
        """Whether words are noised as vectors of logits (`simplex`) instead of masked."""

    @property
    def pattern(self) -> AttentionPattern: ...

    @property
    def scored_tokens_per_row(self) -> int:
        """Data tokens that a row contributes to every denominator: all but token 0."""

    def training_inputs(self, rows: np.ndarray, slots: np.ndarray, step: int, seed: int, global_batch: int) -> NetworkInputs:
        """Lay out rows int64 [m, L] that fill `slots` int64 [m] of step `step`'s global batch.

        Raises DataError for a token that equals MASK or lies beyond it, ValueError for shapes that do not fit.
        """

    def validation_inputs(self, rows: np.ndarray, row_indices: np.ndarray, seed: int) -> NetworkInputs:
        """Lay out held-out rows int64 [m, L] with the noise that (seed, row index) fixes for ever; raises as `training_inputs`."""

    def block_samples(self, inputs: NetworkInputs, nll: Tensor, row_indices: np.ndarray, seed: int) -> BlockSamples:
        """What a validation pass says about single blocks: `inputs` of `validation_inputs` for these rows, and their nll [n]."""


@dataclass(frozen=True)
class Autoregressive(Traits):
    """The next-token loss: x_0 under a causal mask, row i predicts token i + 1, weight 1. Its NELBO is the exact likelihood."""

    kind: ClassVar[str] = "ar"
    block_size: ClassVar[int] = 1
    shifted: ClassVar[bool] = True

    mask_id: int
    context: int
    pad_to: int = 1
    document_end: int | None = None
    pattern: AttentionPattern = field(init=False)

    def __post_init__(self) -> None:
        check_shape(self.context, self.pad_to)
        object.__setattr__(self, "pattern", AttentionPattern("causal", self.context, 1, document_end=self.document_end))

    def training_inputs(self, rows: np.ndarray, slots: np.ndarray, step: int, seed: int, global_batch: int) -> NetworkInputs:
        """As `Objective.training_inputs`; the only noise is that of dropout."""
        return self._inputs(rows, noise.dropout_keys(seed, step, slots))

    def validation_inputs(self, rows: np.ndarray, row_indices: np.ndarray, seed: int) -> NetworkInputs:
        """As `Objective.validation_inputs`, without any noise."""
        return self._inputs(rows, np.zeros(len(row_indices), np.int64))

    def block_samples(self, inputs: NetworkInputs, nll: Tensor, row_indices: np.ndarray, seed: int) -> BlockSamples:
        """As `Objective.block_samples`: every token is a block with t = 1."""
        losses = block_losses(inputs, nll)
        return BlockSamples(np.ones_like(losses), losses, masked_counts(inputs), counted_tokens(self.pattern))

    def _inputs(self, rows: np.ndarray, dropout_keys: np.ndarray) -> NetworkInputs:
        rows = checked_rows(rows, len(dropout_keys), self.context, self.mask_id)
        selected = np.arange(rows.size).reshape(rows.shape)[:, :-1].ravel()
        return network_inputs(rows, rows, selected, rows[:, 1:].ravel(), np.ones(len(selected)), dropout_keys, self.pattern, self.pad_to)


# -- From a recipe -----------------------------------------------------------------------------------------------------


def _block_diffusion(
    config: ObjectiveConfig, context: int, mask_id: int, pad_to: int, document_end: int | None, row_multiple: int
) -> Objective:
    return BlockDiffusion(
        mask_id,
        context,
        config.block_size,
        config.interval,
        config.clean_half,
        config.schedule,
        pad_to,
        config.resample,
        document_end,
        row_multiple,
    )


def _masked_diffusion(
    config: ObjectiveConfig, context: int, mask_id: int, pad_to: int, document_end: int | None, row_multiple: int
) -> Objective:
    if document_end is not None:
        raise RecipeError(
            f"data.document_mask is true, but {config.kind} denoises a row as one block, in which such a mask would tell where documents "
            "end; set data.document_mask=false"
        )
    made = ScoreEntropy if config.kind == ScoreEntropy.kind else MaskedDiffusion
    return made(mask_id, context, config.interval, config.schedule, pad_to, config.resample)


def _simplex_diffusion(
    config: ObjectiveConfig, context: int, mask_id: int, pad_to: int, document_end: int | None, row_multiple: int
) -> Objective:
    return SimplexDiffusion(mask_id, context, config.block_size, config.interval, config.clean_half, pad_to, document_end, row_multiple)


def _autoregressive(
    config: ObjectiveConfig, context: int, mask_id: int, pad_to: int, document_end: int | None, row_multiple: int
) -> Objective:
    return Autoregressive(mask_id, context, pad_to, document_end)


@dataclass(frozen=True)
class _Kind:
    build: Callable[[ObjectiveConfig, int, int, int, int | None, int], Objective]
    unused: tuple[str, ...] = ()
    """Keys of ObjectiveConfig that mean nothing to this kind."""


OBJECTIVES: dict[str, _Kind] = {
    BlockDiffusion.kind: _Kind(_block_diffusion),
    MaskedDiffusion.kind: _Kind(_masked_diffusion, ("block_size", "clean_half")),
    ScoreEntropy.kind: _Kind(_masked_diffusion, ("block_size", "clean_half")),
    SimplexDiffusion.kind: _Kind(_simplex_diffusion, ("schedule", "resample")),
    Autoregressive.kind: _Kind(_autoregressive, ("block_size", "interval", "clean_half", "schedule", "resample")),
}
"""objective.kind -> how it is built from (config with one block size, context, mask id, pad_to, document_end, row_multiple)."""


def build_objective(config: ObjectiveConfig, context: int, mask_id: int, pad_to: int = 1, document_end: int | None = None) -> Objective:
    """The objective that a recipe starts with, for rows of `context` tokens. Raises RecipeError for what cannot work at any step."""
    every_stage = [objective_at(config, context, mask_id, step, pad_to=pad_to, document_end=document_end) for step, _ in _stages(config)]
    return every_stage[0]


def objective_at(
    config: ObjectiveConfig,
    context: int,
    mask_id: int,
    step: int,
    interval: tuple[float, float] | None = None,
    pad_to: int = 1,
    document_end: int | None = None,
    row_multiple: int = 1,
) -> Objective:
    """The objective of update `step` (updates done before it): its stage of `objective.block_size`, and the tuned `interval`.

    `interval` None: the recipe's. `document_end`: the token that ends a document, where documents are kept apart. `row_multiple`: see
    `traits.block_pattern`. Equal arguments give the same object, so that asking at every step costs nothing. Raises RecipeError as
    `build_objective`.
    """
    beta_omega = tuple(float(value) for value in (config.interval if interval is None else interval))
    size = [size for start, size in _stages(config) if start <= step][-1]
    return _built(
        config.kind,
        size,
        beta_omega,
        config.clean_half,
        config.schedule,
        config.resample,
        context,
        mask_id,
        pad_to,
        document_end,
        row_multiple,
    )


@lru_cache(maxsize=64)
def _built(
    kind: str,
    block_size: int | None,
    interval: tuple[float, float],
    clean_half: str,
    schedule: str,
    resample: bool,
    context: int,
    mask_id: int,
    pad_to: int,
    document_end: int | None,
    row_multiple: int,
) -> Objective:
    config = ObjectiveConfig(kind, block_size, interval, clean_half, schedule, resample)
    return OBJECTIVES[kind].build(config, context, mask_id, pad_to, document_end, row_multiple)


def _stages(config: ObjectiveConfig) -> tuple[tuple[int, int | None], ...]:
    """((from step, block size), ...). Raises RecipeError for an unknown kind and for keys that its kind does not use."""
    if config.kind not in OBJECTIVES:
        raise RecipeError(f"objective.kind is {config.kind!r}, which does not exist; set one of {', '.join(OBJECTIVES)}")
    unused = OBJECTIVES[config.kind].unused
    for item in fields(ObjectiveConfig):
        value, default = getattr(config, item.name), item.default
        same = tuple(value) == default if isinstance(default, tuple) else value == default
        if item.name in unused and not same:
            neutral = "null" if default is None else str(list(default)) if isinstance(default, tuple) else str(default).lower()
            raise RecipeError(
                f"objective.{item.name} is {value!r}, which means nothing to objective.kind={config.kind}; remove objective.{item.name} "
                f"or set objective.{item.name}={neutral}"
            )
    return block_sizes(config.block_size) if "block_size" not in unused else ((0, None),)
