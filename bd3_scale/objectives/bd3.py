"""Block diffusion, and what it shares with masked diffusion (mdlm, sedd): the noise of a row, the masked positions, their weights.

The network predicts the masked tokens and is not conditioned on the time; each is scored by cross-entropy with the weight
of the schedule (Arriola et al. 2025, eq. 8; Sahoo et al. 2024). Invariants: as in `table`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.objectives import noise
from bd3_scale.objectives.base import ObjectiveBase, block_pattern, check_padding
from bd3_scale.objectives.control_variate import control
from bd3_scale.objectives.draws import NoisyRows, fold
from bd3_scale.objectives.mask_resampling import resampled_tokens
from bd3_scale.objectives.network_inputs import (
    BlockSamples,
    DataRows,
    NetworkInputs,
    block_losses,
    masked_counts,
    network_inputs,
)
from bd3_scale.objectives.noise import LINEAR, Schedule, schedule_named
from bd3_scale.objectives.time_density import TimeDensity, time_density
from bd3_scale.recipe.objective_kinds import KINDS, VALIDATION_INTERVAL, Kind
from bd3_scale.rules.objective import check_draws, check_resampling, check_schedule, check_shape, checked_interval


class AbsorbingDiffusion(ObjectiveBase):
    """Diffusion whose noise replaces tokens by MASK, the absorbing state: everything but the fields and the attention pattern."""

    mask_id: int
    block_size: int
    interval: tuple[float, float]
    noise_schedule: str
    density: str
    density_shape: tuple[float, ...]
    learned: tuple[float, ...]
    masked_nll: tuple[float, ...]
    pad_to: int
    resample: bool
    draws: int = 1
    pairs: str = "independent"

    def _check(self) -> None:
        check_shape(self.context, self.block_size)
        check_padding(self.pad_to)
        check_schedule(self.noise_schedule)
        object.__setattr__(self, "interval", checked_interval(self.interval))
        object.__setattr__(self, "density_shape", tuple(self.density_shape or ()))
        if self.resample:
            check_resampling(self.block_size)
        check_draws(self.draws, self.pairs, self.noise_schedule, "learned" if self.learned else self.density)

    @property
    def times(self) -> TimeDensity:
        """What training draws t from."""
        return time_density(self.interval, self.density, self.density_shape, self.learned)

    def training_inputs(self, rows: np.ndarray, slots: np.ndarray, step: int, seed: int, global_batch: int) -> NetworkInputs:
        """As `Objective.training_inputs`: t of the interval and density, the schedule's mask probability and weight."""
        schedule, noisy = schedule_named(self.noise_schedule), NoisyRows.of(slots, global_batch, self.draws, self.pairs)
        of_draws, folded = (seed, step, noisy.slots), fold(self.pairs, self.interval)
        positions = noise.block_times(*of_draws, noisy.batch, self.blocks, (0.0, 1.0), noisy.mirrored, folded)
        times, corrections = self.times.draw(positions)
        probabilities = schedule.mask_probability(times)
        if self.resample:
            low, high = schedule.mask_probability(np.array(self.interval))
            bounds = float(low), float(high)
            denoised = np.repeat(DataRows.of(rows, len(slots), self.pattern, self.mask_id).denoised, self.draws, axis=0)
            masked = resampled_tokens(*of_draws, probabilities, denoised, self.block_size, bounds, noisy.mirrored)
        else:
            masked = noise.masked_tokens(*of_draws, probabilities, self.block_size, noisy.mirrored)
        return self._inputs(rows, masked, times, schedule, noise.dropout_keys(seed, step, slots), self.pattern, corrections)

    def control(self, inputs: NetworkInputs, real: int) -> float:
        """As `Objective.control`, where `masked_nll` is known."""
        return control(inputs, real, self.masked_nll, self.interval) if self.masked_nll else 0.0

    def validation_inputs(self, rows: np.ndarray, row_indices: np.ndarray, seed: int) -> NetworkInputs:
        """As `Objective.validation_inputs`: t ~ U[1e-3, 1] and weight 1/t, whatever training does.

        With L' = 1 the likelihood is exact: t = 1, every token but token 0 masked, weight 1.
        """
        exact = self.block_size == 1
        return self.evaluation_inputs(rows, row_indices, seed, (1.0, 1.0) if exact else VALIDATION_INTERVAL)

    def evaluation_inputs(self, rows: np.ndarray, row_indices: np.ndarray, seed: int, interval: tuple[float, float]) -> NetworkInputs:
        """Held-out rows at t ~ U[beta, omega] of one's own choice, linear schedule, weight 1/t: for studies of an interval."""
        times = noise.validation_times(seed, row_indices, self.blocks, checked_interval(interval))
        masked = noise.validation_masked_tokens(seed, row_indices, LINEAR.mask_probability(times), self.block_size)
        return self._inputs(rows, masked, times, LINEAR, np.zeros(len(row_indices), np.int64), self.of_one_draw)

    def block_samples(self, inputs: NetworkInputs, nll: Tensor, row_indices: np.ndarray, seed: int) -> BlockSamples:
        """As `Objective.block_samples`: the B blocks of each row with t ~ U[1e-3, 1].

        With L' = 1 validation is exact, and the nll of a token given the clean tokens before it does not depend on t: what
        a pass at t ~ U[1e-3, 1] would give is nll / t where the token is masked and 0 elsewhere, without another forward.
        Then there are 2B draws a row: those, and the exact ones with t = 1. (Drawn t lie below 1.)
        """
        losses, masked, maskable = block_losses(inputs, nll), masked_counts(inputs), inputs.denoised
        times = noise.validation_times(seed, row_indices, self.blocks)
        if self.block_size > 1:
            return BlockSamples(times, losses, masked, maskable)
        drawn = noise.validation_masked_tokens(seed, row_indices, LINEAR.mask_probability(times), 1) & (maskable > 0)
        weighted = losses * np.where(drawn, LINEAR.weight(times), 0.0)
        return BlockSamples(
            times=np.concatenate([times, np.ones_like(times)], axis=1),
            losses=np.concatenate([weighted, losses], axis=1),
            masked=np.concatenate([drawn.astype(np.int64), masked], axis=1),
            maskable=np.concatenate([maskable, maskable], axis=1),
        )

    def _inputs(
        self,
        rows: np.ndarray,
        masked: np.ndarray,
        times: np.ndarray,
        schedule: Schedule,
        dropout_keys: np.ndarray,
        pattern: AttentionPattern,
        corrections: np.ndarray | None = None,
    ) -> NetworkInputs:
        """Rows [m, L], and for each of their draws, row after row, what noise would mask [m draws, L] and the times [m draws, B], with the
        `corrections` of the density that these come from (None: it is uniform)."""
        data = DataRows.of(rows, len(dropout_keys), pattern, self.mask_id)
        drawn, denoised = (np.repeat(of_rows, pattern.draws, axis=0) for of_rows in (data.tokens, data.denoised))
        masked = masked & denoised
        noisy = np.where(masked, self.mask_id, drawn).reshape(len(rows), pattern.scored_rows)
        selected = np.flatnonzero(masked)
        # L' divides L: the flat position over L' is the flat block. t = 0 masks nothing and is never divided by.
        block = selected // self.block_size
        weights = schedule.weight(times.ravel()[block])
        if corrections is not None:
            weights = weights * corrections.ravel()[block]
        return network_inputs(noisy, data, selected, drawn.ravel()[selected], weights, dropout_keys, pattern, self.pad_to, sparse=True)


@dataclass(frozen=True)
class BlockDiffusion(AbsorbingDiffusion):
    """Block diffusion (Arriola et al. 2025): [x_t ; x_0] in one pass, masked noisy positions scored with the schedule's weight.

    Raises RecipeError when block size, interval, schedule or clean half cannot work.
    """

    traits: ClassVar[Kind] = KINDS["bd3"]

    mask_id: int
    context: int
    """L, data tokens per row."""
    block_size: int
    """L', tokens per block."""
    interval: tuple[float, float] = VALIDATION_INTERVAL
    """[beta, omega] of training; validation never looks at it."""
    clean_half: str = "block_causal"
    noise_schedule: str = "linear"
    pad_to: int = 1
    """The number of selected positions is padded to a multiple of this, so that shapes repeat."""
    resample: bool = False
    """Training keeps the masked fraction of every block inside the interval, too (see `mask_resampling`)."""
    density: str = "uniform"
    """Of t inside the interval, in training (see `time_density`), with its `density_shape`."""
    density_shape: tuple[float, ...] = ()
    learned: tuple[float, ...] = ()
    """The shape that the tuner found instead; (): none."""
    masked_nll: tuple[float, ...] = ()
    """For the control variate; (): there is none."""
    document_end: int | None = None
    """Documents that share a row and end with this token do not see each other (see `attention.mask`)."""
    row_multiple: int = 1
    """The clean half is cut where nothing is seen of it if it stays a multiple of this."""
    draws: int = 1
    """k, noisy draws in training that share the clean half of their row (see `draws`)."""
    pairs: str = "independent"
    """How two draws belong together: independent | complement | antithetic."""
    pattern: AttentionPattern = field(init=False)

    def __post_init__(self) -> None:
        pattern = block_pattern(self.context, self.block_size, self.clean_half, self.document_end, self.row_multiple, self.draws)
        self._check()
        object.__setattr__(self, "pattern", pattern)
