"""The interval tuner: one validation pass gives the variance of the objective on every candidate interval; the least wins.

Clipping t to [beta, omega] changes nothing but the variance of the train loss and gradient, and that decides how well a
block size trains (Arriola et al. 2025, section 5). The statistic of a candidate is the variance, over rows and blocks, of
a block's mean weighted loss at t ~ U[beta, omega]. A pass at t ~ U[1e-3, 1] has an exact sample of that for every
candidate at once: its blocks whose t falls inside. With `objective.resample` training draws other masks than that, and
every block of the pass counts with an importance weight (see `mask_resampling`).

From pass to choice:
    Objective.block_samples    -> single blocks of one micro-batch
    row_statistics             -> (weight, mean, M2) of every row and interval, on the rank that holds the row
    interval_statistics        -> all ranks' rows joined by Chan's formula, after one all-gather
    choose                     -> the interval, and `choose_density` the density on it, on the leader; broadcast; `agreed` compares what
                                  every rank then has

Invariants: a row's statistics are made from that row alone and rows are joined in the order of their index, so that the
result does not depend, bit for bit, on ranks or micro-batches, as long as the losses do not. Losses do differ by rounding
(1e-7) between layouts; a change of the interval needs a margin far above that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bd3_scale.errors import CheckpointError, TrainingError
from bd3_scale.objectives.loss_profile import POOLS, count_sums
from bd3_scale.objectives.mask_resampling import importance
from bd3_scale.objectives.network_inputs import BlockSamples
from bd3_scale.recipe.objective_kinds import block_size_shares, block_sizes
from bd3_scale.recipe.schema import ObjectiveConfig, TunerConfig
from bd3_scale.rules.objective import Interval
from bd3_scale.tuning.density_tuner import DensityChoice
from bd3_scale.tuning.estimates import Moments, combine

LEAST_BLOCKS = 30
"""A variance of fewer (effective) blocks is no basis for a choice: its relative standard error is above a quarter."""
TIE = 1e-6
"""Variances this close, relative, are one: layouts round losses differently by 1e-7, distinct candidates lie further apart."""


def due(tuner: TunerConfig, step: int) -> bool:
    """Whether the interval is tuned after `step` updates."""
    return tuner.enabled and step >= tuner.start_step and step > 0 and step % tuner.every == 0


# -- The statistic -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowStatistics:
    """Moments of the block losses of m rows on k intervals, row by row; what one rank sends to the others."""

    rows: np.ndarray
    """int64 [m]: indices of the held-out rows."""
    intervals: tuple[Interval, ...]
    count: np.ndarray
    """float64 [m, k], as `mean`, `m2` and `squares`: blocks inside each interval (sum of their weights)."""
    mean: np.ndarray
    m2: np.ndarray
    squares: np.ndarray
    """Sum of squared weights."""
    counts: np.ndarray
    """float64 [m, 5, POOLS]: see `density_tuner.count_sums`."""

    def first(self, rows: int) -> RowStatistics:
        """Those of the first `rows` held-out rows only."""
        kept = self.rows < rows
        arrays = (getattr(self, name)[kept] for name in ("count", "mean", "m2", "squares", "counts"))
        return RowStatistics(self.rows[kept], self.intervals, *arrays)


def row_statistics(
    samples: BlockSamples, row_indices: np.ndarray, intervals: tuple[Interval, ...], resample: bool = False
) -> RowStatistics:
    """`samples` of m rows of the given indices -> their statistics on `intervals`; `resample` as in `objective.resample`.

    A block counts where beta <= t < omega, for a point [t, t] where t is exactly that. For no rows at all see `no_rows`.
    """
    values = np.zeros((4, len(row_indices), len(intervals)))
    counted = samples.maskable > 0
    # Row by row: vectorised sums may round differently with the number of rows beside.
    for row in range(len(row_indices)):
        of_row = (samples.times, samples.losses, samples.masked, samples.maskable)
        times, losses, masked, maskable = (of[row, counted[row]] for of in of_row)
        if resample:
            weights, means, within = _as_resampled(times, losses, masked, maskable, intervals)
        else:
            weights = np.stack([_inside(times, interval) for interval in intervals], axis=1).astype(np.float64)
            means, within = losses[:, None], np.zeros((1, 1))
        total = weights.sum(0)
        with np.errstate(invalid="ignore"):  # an infinite loss is reported once all rows are together
            mean = np.divide((weights * means).sum(0), total, out=np.zeros_like(total), where=total > 0)
            values[:, row] = total, mean, (weights * (np.square(means - mean) + within)).sum(0), np.square(weights).sum(0)
    count, mean, m2, squares = values
    return RowStatistics(np.asarray(row_indices, np.int64), intervals, count, mean, m2, squares, count_sums(samples))


def no_rows(intervals: tuple[Interval, ...]) -> RowStatistics:
    """What a rank without rows of its own sends (a tensor or pipeline peer of one that speaks for the replica)."""
    nothing = np.zeros((0, len(intervals)))
    return RowStatistics(np.zeros(0, np.int64), intervals, nothing, nothing, nothing, nothing, np.zeros((0, 5, POOLS)))


def _inside(times: np.ndarray, interval: Interval) -> np.ndarray:
    beta, omega = interval
    return (times >= beta) & (times < omega) if beta < omega else times == beta


def _as_resampled(
    times: np.ndarray, losses: np.ndarray, masked: np.ndarray, maskable: np.ndarray, intervals: tuple[Interval, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks [b] of the pass as those that `resample` draws on each interval: weight, mean and variance of loss, [b, k] each.

    Under an interval a block's t is not known, only its masked count: its loss is sum(nll) / t with t's conditional mean and
    variance of 1 / t.
    """
    sums = losses * times
    weights, means, within = np.empty((3, len(times), len(intervals)))
    for size in np.unique(maskable):
        here = maskable == size
        table = importance(int(size), intervals)
        weights[here] = table.weight[masked[here]]
        means[here] = sums[here, None] * table.inverse_time[masked[here]]
        within[here] = np.square(sums[here, None]) * table.inverse_time_variance[masked[here]]
    return weights, means, within


@dataclass(frozen=True)
class IntervalStatistics:
    """The block losses of all rows on each of k intervals."""

    intervals: tuple[Interval, ...]
    moments: Moments
    """float64 [k] each; `count` is the sum of weights."""
    squares: np.ndarray
    """float64 [k]: sum of squared weights."""
    counts: np.ndarray
    """float64 [5, POOLS]: `density_tuner.count_sums` of all rows."""

    @property
    def blocks(self) -> np.ndarray:
        """Effective number of blocks, float64 [k]: (sum w)^2 / sum w^2, the plain number where all weights are 1."""
        return np.divide(np.square(self.moments.count), self.squares, out=np.zeros_like(self.squares), where=self.squares > 0)

    @property
    def variances(self) -> np.ndarray:
        """Sample variance, float64 [k], in (nats per data token)^2; nan where there are fewer than two blocks."""
        blocks, count = self.blocks, np.asarray(self.moments.count)
        enough = blocks > 1 + 1e-9
        biased = np.divide(self.moments.m2, count, out=np.full_like(count, np.nan), where=enough)
        return biased * np.divide(blocks, blocks - 1, out=np.ones_like(blocks), where=enough)

    def variance_of(self, interval: Interval) -> float:
        """Of one of `intervals`; nan of another."""
        return float(self.variances[self.intervals.index(interval)]) if interval in self.intervals else math.nan


def interval_statistics(parts: Sequence[RowStatistics]) -> IntervalStatistics:
    """All rows of all parts (ranks, micro-batches; in any order) joined in the order of their indices.

    Raises TrainingError where a row has a loss that is not a finite number (on every rank alike, if all have all parts),
    ValueError for no rows, rows that occur twice and parts of different intervals.
    """
    if len({part.intervals for part in parts}) != 1:
        raise ValueError("the parts of a tuning must be of the same intervals")
    rows = np.concatenate([part.rows for part in parts])
    order = np.argsort(rows, kind="stable")
    if rows.size == 0 or (np.diff(rows[order]) == 0).any():
        raise ValueError("a tuning needs rows, each of them once")
    count, mean, m2, squares, counts = (
        np.concatenate([getattr(part, name) for part in parts])[order] for name in ("count", "mean", "m2", "squares", "counts")
    )
    bad = ~np.isfinite(m2).all(1)
    if bad.any():
        raise TrainingError(
            f"the tuner met a loss that is not a finite number in held-out row {rows[order][bad][0]}; continue from an earlier "
            "checkpoint (its name in checkpoints/latest), with a lower training.learning_rate and run.amend=[training.learning_rate]"
        )
    joined = combine(Moments(*row) for row in zip(count, mean, m2, strict=True))
    return IntervalStatistics(parts[0].intervals, joined, squares.sum(0), counts.sum(0))


# -- The choice --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The interval to train on from now, and why."""

    interval: Interval
    variance: float
    """Of `interval`; nan where too few blocks fell into it."""
    changed: bool
    density: DensityChoice | None = None
    """On `interval`; None where no density is learned."""
    masked_nll: tuple[float, ...] = ()
    """See `control_variate`."""


def choose(intervals: Sequence[Interval], variances: np.ndarray, blocks: np.ndarray, current: Interval, margin: float) -> Choice:
    """The interval with the least variance, if it beats the current one by more than `margin`; else the current one.

    variances, blocks: float64 [k]. An interval of fewer than LEAST_BLOCKS blocks is not eligible, and an unmeasured current
    one is kept, because nothing then shows that another is better. Ties keep the wider interval, then the earlier one.

    Why a margin, and why 2 % by default: a variance of n blocks has the relative standard error sqrt((kurtosis - 1) / n),
    which at the default 512 rows of 64 blocks (L' = 16) is one or two per cent, so that a smaller difference says nothing.
    Differences that matter are far larger: in the paper at L' = 16 clipping halves the variance (7.62 to 3.60 and 3.58,
    table 8), while the two clips, 0.6 % apart, are equals to us. As every tuning sees the same rows and noise, what the
    margin holds back is the slow drift of the weights, which would otherwise walk the interval among equals.
    """
    if current not in intervals:
        raise ValueError(f"the current interval {current} is not among those measured")
    usable = [k for k in range(len(intervals)) if blocks[k] >= LEAST_BLOCKS and math.isfinite(variances[k])]
    here = list(intervals).index(current)
    if here not in usable:
        return Choice(current, math.nan, False)
    least = min(variances[k] for k in usable)
    tied = [k for k in usable if variances[k] <= least * (1 + TIE)]
    best = min(tied, key=lambda k: (-round(intervals[k][1] - intervals[k][0], 9), k))
    if variances[best] < (1 - margin) * variances[here]:
        return Choice(intervals[best], float(variances[best]), True)
    return Choice(current, float(variances[here]), False)


def agreed(values: Sequence[Sequence[float]], what: str = "intervals") -> None:
    """Whether all ranks have the same (`values` in rank order). Raises TrainingError that names the ranks that differ."""
    different = {rank: value for rank, value in enumerate(values) if tuple(value) != tuple(values[0])}
    if different:
        named = ", ".join(f"rank {rank} has {list(value)}" for rank, value in different.items())
        raise TrainingError(
            f"ranks train on different {what}: rank 0 has {list(values[0])}, {named}; resume the run from its last checkpoint"
        )


# -- The state ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TunerState:
    """What tuning has decided so far: goes into every checkpoint as a plain dictionary. A fixed interval is a state, too."""

    block_size: int
    """L' that `interval` was found for."""
    interval: Interval
    history: tuple[dict[str, Any], ...] = ()
    """One {step, block_size, interval, variance} per tuning; variance None where it could not be measured."""
    density: tuple[float, ...] = ()
    """The shape of the density that was learned on `interval` (see `time_density`); (): none, the recipe's holds."""
    masked_nll: tuple[float, ...] = ()
    """What the control variate of the reported train loss lives on (see `control_variate`); (): there is none."""
    others: tuple[TunerState, ...] = ()
    """Of the other block sizes of a mixture, ascending."""

    @classmethod
    def begin(cls, objective: ObjectiveConfig) -> TunerState:
        """That of a new run; of a mixture, of the block size with the largest share."""
        interval, first = _pair(objective.interval), block_sizes(objective.block_size)[0][1]
        others = block_size_shares(objective.block_size).keys() - {first} if isinstance(objective.block_size, dict) else ()
        return cls(first, interval, others=tuple(cls(size, interval) for size in sorted(others)))

    def at(self, block_size: int, start: Interval) -> TunerState:
        """The state under `block_size`: another L' has another best interval, whose search begins at the recipe's, or goes on where it
        was in a mixture."""
        found = next((other for other in self.others if other.block_size == block_size), None)
        if found is not None:
            rest = [other for other in self.others if other is not found]
            others = sorted([*rest, replace(self, others=())], key=lambda other: other.block_size)
            return replace(found, others=tuple(others))
        return self if block_size == self.block_size else TunerState(block_size, _pair(start), self.history)

    def after(self, step: int, choice: Choice) -> TunerState:
        """The state once `choice` is made after `step` updates."""
        variance = choice.variance if math.isfinite(choice.variance) else None
        entry = {"step": step, "block_size": self.block_size, "interval": list(choice.interval), "variance": variance}
        density = self.density if choice.interval == self.interval else ()
        if choice.density is not None:
            density = choice.density.learned
        history = (*self.history, entry)
        return replace(self, interval=choice.interval, density=density, masked_nll=choice.masked_nll, history=history)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, lists and strings only: the same after JSON."""
        learned = {name: list(getattr(self, name)) for name in ("density", "masked_nll") if getattr(self, name)}
        return {
            "block_size": self.block_size,
            "interval": list(self.interval),
            **learned,
            "history": [dict(entry) for entry in self.history],
            **({"others": [other.to_dict() for other in self.others]} if self.others else {}),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> TunerState:
        """Raises CheckpointError for what `to_dict` cannot have written."""
        try:
            history = tuple(
                {
                    "step": int(entry["step"]),
                    "block_size": int(entry["block_size"]),
                    "interval": list(_pair(entry["interval"])),
                    "variance": None if entry["variance"] is None else float(entry["variance"]),
                }
                for entry in state["history"]
            )
            density = tuple(int(part) for part in state.get("density", ()))
            if density and not (min(density) >= 0 and sum(density) > 0):
                raise ValueError(f"density {density}")
            masked_nll = tuple(float(nll) for nll in state.get("masked_nll", ()))
            others = tuple(cls.from_dict(other) for other in state.get("others", ()))
            return cls(int(state["block_size"]), _pair(state["interval"]), history, density, masked_nll, others)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's tuner state cannot be read ({error!r}); resume from another checkpoint") from None


def _pair(interval: Sequence[float]) -> Interval:
    beta, omega = interval
    return float(beta), float(omega)
