"""What goes into the network, what is scored, and with which weight.

An objective lays rows of data tokens out as `NetworkInputs` on the host; the network answers with one negative
log-likelihood (nll) per selected position. Two numbers come of that and are never mixed:

    train loss = sum(weight * nll) / (global_batch * (L - 1)), over all ranks and micro-batches, at the training interval;
    NELBO      = the same quotient over the held-out rows at t ~ U[1e-3, 1], linear schedule, fixed noise: nats per data token.

Invariants: targets are not shifted (position i predicts token i); one t per block; token 0 of a row is never masked and
never counted; division is by data tokens, never by masked ones; nothing here depends on rank or micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from bd3_scale.diffusion import noise
from bd3_scale.diffusion.config import ObjectiveConfig
from bd3_scale.diffusion.mask import AttentionPattern
from bd3_scale.diffusion.schedule import LINEAR, Schedule, check_interval, schedule_named
from bd3_scale.errors import DataError, RecipeError


@dataclass(frozen=True)
class NetworkInputs:
    """One micro-batch of m rows of L data tokens, ready for the network. Made on the host, then moved.

    `selected` ascends over its first entries; padding entries follow with position 0, target 0, weight 0. There is always
    at least one entry, so that no kernel meets an empty tensor.
    """

    tokens: Tensor
    """int64 [m, pattern.rows]: [x_t ; x_0] for block diffusion."""
    positions: Tensor
    """int64 [pattern.rows]: rotary position of each row of the network, 0..L-1 in both halves."""
    selected: Tensor
    """int64 [n]: flat index b * L + i of each scored position of sample b in the noisy half (the first L rows)."""
    targets: Tensor
    """int64 [n]: the token at each selected position."""
    weights: Tensor
    """float32 [n]: loss weight of each selected position; 0 marks padding."""
    dropout_keys: Tensor
    """int64 [m] in [0, 2^32): seed for the dropout of each row."""
    pattern: AttentionPattern

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NetworkInputs:
        """A copy on `device`. `non_blocking` to CUDA goes through pinned memory, without which it would block."""
        pin = non_blocking and torch.device(device).type == "cuda"

        def move(value: Tensor) -> Tensor:
            value = value.pin_memory() if pin and not value.is_cuda else value
            return value.to(device, non_blocking=non_blocking)

        return NetworkInputs(
            tokens=move(self.tokens),
            positions=move(self.positions),
            selected=move(self.selected),
            targets=move(self.targets),
            weights=move(self.weights),
            dropout_keys=move(self.dropout_keys),
            pattern=self.pattern,
        )


class Objective(Protocol):
    """What the training loop, the evaluation and the network need to know of an objective."""

    @property
    def pattern(self) -> AttentionPattern: ...

    @property
    def scored_tokens_per_row(self) -> int: ...

    def training_inputs(self, rows: np.ndarray, slots: np.ndarray, step: int, seed: int, global_batch: int) -> NetworkInputs: ...

    def validation_inputs(self, rows: np.ndarray, row_indices: np.ndarray, seed: int) -> NetworkInputs: ...


@dataclass(frozen=True)
class BlockDiffusion:
    """Block diffusion (Arriola et al. 2025): [x_t ; x_0] in one pass, masked noisy positions scored with the schedule's weight.

    Raises RecipeError when block size, interval, schedule or clean half cannot work. A tuner makes a new one with
    `dataclasses.replace(objective, interval=...)`.
    """

    kind: ClassVar[str] = "bd3"

    mask_id: int
    context: int
    """L, data tokens per row."""
    block_size: int
    """L', tokens per block."""
    interval: tuple[float, float] = noise.VALIDATION_INTERVAL
    """[beta, omega] of training; validation never looks at it."""
    clean_half: str = "block_causal"
    schedule: str = "linear"
    pad_to: int = 1
    """The number of selected positions is padded to a multiple of this, so that shapes repeat."""
    pattern: AttentionPattern = field(init=False)

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.context % self.block_size:
            divisors = [size for size in range(1, self.context + 1) if self.context % size == 0]
            nearest = min(divisors, key=lambda size: abs(size - self.block_size))
            raise RecipeError(
                f"objective.block_size is {self.block_size} but must divide model.context = {self.context}, because a row is cut "
                f"into equal blocks; set it to {nearest}"
            )
        if self.context < 2:
            raise RecipeError(f"model.context is {self.context}, but token 0 is never scored; set it to 2 or more")
        if self.clean_half not in ("block_causal", "causal"):
            raise RecipeError(f"objective.clean_half is {self.clean_half!r}; set block_causal or causal")
        if self.pad_to < 1:
            raise ValueError(f"pad_to must be at least 1, got {self.pad_to}")
        schedule_named(self.schedule)
        object.__setattr__(self, "interval", check_interval(self.interval))
        clean_half = cast(Literal["block_causal", "causal"], self.clean_half)
        object.__setattr__(self, "pattern", AttentionPattern("block_diffusion", self.context, self.block_size, clean_half))

    @property
    def blocks(self) -> int:
        """B = L / L', blocks per row."""
        return self.context // self.block_size

    @property
    def scored_tokens_per_row(self) -> int:
        """Data tokens that a row contributes to every denominator: all but token 0."""
        return self.context - 1

    def training_inputs(self, rows: np.ndarray, slots: np.ndarray, step: int, seed: int, global_batch: int) -> NetworkInputs:
        """Lay out rows int64 [m, L] that fill `slots` int64 [m] of step `step`'s global batch.

        Raises DataError for a token that equals MASK or lies beyond it, ValueError for shapes that do not fit.
        """
        schedule = schedule_named(self.schedule)
        times = noise.block_times(seed, step, slots, global_batch, self.blocks, self.interval)
        masked = noise.masked_tokens(seed, step, slots, schedule.mask_probability(times), self.block_size)
        return self._inputs(rows, masked, times, schedule, noise.dropout_keys(seed, step, slots))

    def validation_inputs(self, rows: np.ndarray, row_indices: np.ndarray, seed: int) -> NetworkInputs:
        """Lay out held-out rows int64 [m, L] with the noise that (seed, row index) fixes for ever; raises as `training_inputs`.

        t ~ U[1e-3, 1] and weight 1/t, whatever training does. With L' = 1 the likelihood is exact: t = 1, every token but
        token 0 masked, weight 1.
        """
        exact = self.block_size == 1
        times = np.ones((len(row_indices), self.blocks)) if exact else noise.validation_times(seed, row_indices, self.blocks)
        masked = noise.validation_masked_tokens(seed, row_indices, LINEAR.mask_probability(times), self.block_size)
        return self._inputs(rows, masked, times, LINEAR, np.zeros(len(row_indices), np.int64))

    def _inputs(
        self, rows: np.ndarray, masked: np.ndarray, times: np.ndarray, schedule: Schedule, dropout_keys: np.ndarray
    ) -> NetworkInputs:
        rows = np.asarray(rows, np.int64)
        if rows.shape != masked.shape:
            raise ValueError(f"rows have shape {rows.shape}, their noise {masked.shape}; both must be [rows, model.context]")
        if rows.size and not (rows.min() >= 0 and rows.max() < self.mask_id):
            raise DataError(
                f"rows hold token ids {rows.min()}..{rows.max()}, but data ids must lie in [0, {self.mask_id}) because "
                f"{self.mask_id} is MASK; pack the data with the recipe's tokenizer"
            )
        selected = np.flatnonzero(masked)
        # L' divides L: the flat position over L' is the flat block. t = 0 masks nothing and is never divided by.
        weights = schedule.weight(times.ravel()[selected // self.block_size])
        targets = rows.ravel()[selected]
        capacity = -(-max(len(selected), 1) // self.pad_to) * self.pad_to
        padding = (0, capacity - len(selected))
        positions = np.arange(self.context)
        return NetworkInputs(
            tokens=torch.from_numpy(np.concatenate([np.where(masked, self.mask_id, rows), rows], axis=1)),
            positions=torch.from_numpy(np.concatenate([positions, positions])),
            selected=torch.from_numpy(np.pad(selected, padding)),
            targets=torch.from_numpy(np.pad(targets, padding)),
            weights=torch.from_numpy(np.pad(weights, padding).astype(np.float32)),
            dropout_keys=torch.from_numpy(dropout_keys),
            pattern=self.pattern,
        )


def counted_tokens(pattern: AttentionPattern) -> np.ndarray:
    """Data tokens of each block, int64 [B]: L', one less in the first block (0 there when L' = 1)."""
    counts = np.full(pattern.length // pattern.block_size, pattern.block_size, np.int64)
    counts[0] -= 1
    return counts


def _block_sums(inputs: NetworkInputs, nll: Tensor) -> np.ndarray:
    """Sum of weight * nll of each block, float64 [m, B]; padding adds exactly nothing."""
    pattern = inputs.pattern
    rows, blocks = inputs.tokens.shape[0], pattern.length // pattern.block_size
    weights = inputs.weights.detach().cpu().double().numpy()
    weighted = np.multiply(weights, nll.detach().cpu().double().numpy(), out=np.zeros_like(weights), where=weights > 0)
    block = inputs.selected.cpu().numpy() // pattern.block_size
    return np.bincount(block, weighted, minlength=rows * blocks).reshape(rows, blocks)


def block_losses(inputs: NetworkInputs, nll: Tensor) -> np.ndarray:
    """Mean weighted loss of every block, float64 [m, B], in nats per data token.

    `nll`: float [n], one per selected position, as the network returns it. Each block's sum is divided by its data tokens
    (L', L' - 1 in the first block), not by its masked ones: a block without masked tokens has loss 0. With L' = 1 the first
    block has no data token and its loss is nan: leave it out where `counted_tokens` is 0.
    """
    counts = counted_tokens(inputs.pattern).astype(np.float64)
    sums = _block_sums(inputs, nll)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def row_nelbo(inputs: NetworkInputs, nll: Tensor) -> np.ndarray:
    """NELBO of every row, float64 [m], in nats per data token (L - 1 of them), from `validation_inputs` and their nll [n].

    The mean over rows is the set's NELBO (all rows have the same number of data tokens).
    """
    return _block_sums(inputs, nll).sum(axis=1) / (inputs.pattern.length - 1)


def _block_diffusion(config: ObjectiveConfig, context: int, mask_id: int, pad_to: int) -> Objective:
    beta, omega = config.interval
    return BlockDiffusion(mask_id, context, config.block_size, (beta, omega), config.clean_half, config.schedule, pad_to)


OBJECTIVES: dict[str, Callable[[ObjectiveConfig, int, int, int], Objective]] = {BlockDiffusion.kind: _block_diffusion}
"""objective.kind -> its constructor from (config, context, mask id, pad_to)."""


def build_objective(config: ObjectiveConfig, context: int, mask_id: int, pad_to: int = 1) -> Objective:
    """The objective that a recipe names, for rows of `context` tokens. Raises RecipeError for what cannot work."""
    if config.kind not in OBJECTIVES:
        raise RecipeError(f"objective.kind is {config.kind!r}, which does not exist; set one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[config.kind](config, context, mask_id, pad_to)
