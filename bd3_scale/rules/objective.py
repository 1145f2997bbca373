"""The checks of the sections `objective` and `tuner`, and what may be set there: noise schedules, clean halves, intervals.

The objectives take their own checks from here. Invariant: nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

from bd3_scale.errors import RecipeError
from bd3_scale.recipe.definition import KEYS, Recipe
from bd3_scale.recipe.objective_kinds import VALIDATION_INTERVAL, block_sizes
from bd3_scale.recipe.schema import ObjectiveConfig, TunerConfig

Interval = tuple[float, float]

NOISE_SCHEDULES = ("linear", "cosine", "square", "sqrt", "log")
DENSITY_SHAPES: dict[str, tuple[float, ...]] = {"beta": (2.0, 2.0), "pareto": (-0.5,)}
"""objective.density -> its objective.density_shape where the recipe sets none."""
CLEAN_HALVES = KEYS["objective.clean_half"].choices
PAIRS = KEYS["objective.pairs"].choices


def check_objective(config: ObjectiveConfig, context: int, document_mask: bool = False) -> None:
    """Refuse an `objective` section that cannot work at some step for rows of `context` tokens. Raises RecipeError."""
    kind = config.traits
    for item in fields(ObjectiveConfig):
        value, default = getattr(config, item.name), item.default
        same = tuple(value) == default if isinstance(default, tuple) else value == default
        if item.name in kind.unused_keys and not same:
            neutral = "null" if default is None else str(list(default)) if isinstance(default, tuple) else str(default).lower()
            raise RecipeError(
                f"objective.{item.name} is {value!r}, which means nothing to objective.kind={kind.name}; remove objective.{item.name} "
                f"or set objective.{item.name}={neutral}"
            )
    if document_mask and kind.denoises_whole_rows:
        raise RecipeError(
            f"data.document_mask is true, but {kind.name} denoises a row as one block, in which such a mask would tell where documents "
            "end; set data.document_mask=false"
        )
    for size in sorted(config.sizes(context)):
        check_shape(context, size)
        if config.resample:
            check_resampling(size)
    check_clean_half(config.clean_half)
    check_schedule(config.noise_schedule)
    check_draws(config.draws, config.pairs, config.noise_schedule, config.density)
    check_density(config)


def check_density(config: ObjectiveConfig) -> None:
    """Raises RecipeError for an interval, or a density on it, that cannot be."""
    (beta, omega), name, shape = checked_interval(config.interval), config.density, config.density_shape
    if name == "uniform":
        if shape is not None:
            raise RecipeError(f"objective.density_shape is {list(shape)}, but a uniform density has none; set objective.density_shape=null")
        return
    usual, (need, least) = DENSITY_SHAPES[name], {"beta": ("two numbers above 0", 0), "pareto": ("one number above -1", -1)}[name]
    example = str(list(usual)).replace(" ", "")
    if shape is not None and (len(shape) != len(usual) or not all(least < value < math.inf for value in shape)):
        raise RecipeError(
            f"objective.density_shape is {list(shape)}, but objective.density={name} has {need}; set objective.density_shape={example}"
        )
    if beta == omega:
        raise RecipeError(
            f"objective.density is {name}, but objective.interval=[{beta}, {omega}] is one point; set objective.density=uniform"
        )
    if name == "pareto" and beta == 0:
        raise RecipeError(
            "objective.density is pareto, which ends above 0, but objective.interval starts at 0; set objective.interval=[0.001,1.0]"
        )
    if config.resample:
        raise RecipeError(
            f"objective.resample is on, whose loss is no bound that objective.density={name} could keep; set objective.resample=false "
            "or objective.density=uniform"
        )


def check_shape(context: int, block_size: int) -> None:
    """Raises RecipeError unless rows of `context` tokens can be cut into blocks of `block_size`, and have a token that is scored."""
    if context < 2:
        raise RecipeError(f"model.context is {context}, but token 0 is never scored; set it to 2 or more")
    if block_size < 1 or context % block_size:
        divisors = [size for size in range(1, context + 1) if context % size == 0]
        nearest = min(divisors, key=lambda size: abs(size - block_size))
        raise RecipeError(
            f"objective.block_size is {block_size} but must divide model.context = {context}, because a row is cut "
            f"into equal blocks; set it to {nearest}"
        )


def check_resampling(block_size: int) -> None:
    """Raises RecipeError for blocks that `objective.resample` can do nothing for."""
    if block_size == 1:
        raise RecipeError("objective.resample is on, but a block of one token is masked wholly or not at all; set objective.resample=false")


def check_clean_half(name: str) -> None:
    """Raises RecipeError for a name that is not in CLEAN_HALVES."""
    if name not in CLEAN_HALVES:
        raise RecipeError(f"objective.clean_half is {name!r}; set {' or '.join(CLEAN_HALVES)}")


def check_draws(draws: int, pairs: str = "independent", schedule: str = "linear", density: str = "uniform") -> None:
    """Raises RecipeError for a number of draws, or for pairs of them, that cannot be."""
    if draws < 1:
        raise RecipeError(f"objective.draws is {draws}; set 1 or more")
    if pairs not in PAIRS:
        raise RecipeError(f"objective.pairs is {pairs!r}; set one of {', '.join(PAIRS)}")
    if pairs == "independent":
        return
    if draws % 2:
        raise RecipeError(f"objective.pairs={pairs} makes pairs of draws, but objective.draws is {draws}; set objective.draws={draws + 1}")
    if pairs == "complement" and schedule != "linear":
        raise RecipeError(
            f"objective.pairs=complement masks what is left at 1 - t, which is the complement of the linear schedule alone, not of "
            f"objective.noise_schedule={schedule}; set objective.pairs=antithetic or objective.noise_schedule=linear"
        )
    if pairs == "complement" and density != "uniform":
        raise RecipeError(
            f"objective.pairs=complement needs 1 - t to be drawn as often as t, but objective.density is {density}; set "
            "objective.pairs=antithetic or objective.density=uniform"
        )


def check_schedule(name: str) -> None:
    """Raises RecipeError for a name that is not in NOISE_SCHEDULES."""
    if name not in NOISE_SCHEDULES:
        raise RecipeError(f"objective.noise_schedule is {name!r}, which does not exist; set one of {', '.join(NOISE_SCHEDULES)}")


def checked_interval(interval: Sequence[float]) -> Interval:
    """[beta, omega] as floats. Raises RecipeError unless 0 <= beta <= omega <= 1 and omega > 0."""
    values = [float(value) for value in interval]
    if len(values) != 2 or not 0.0 <= values[0] <= values[1] <= 1.0 or values[1] == 0.0:
        raise RecipeError(f"objective.interval is {values}, but training draws t ~ U[beta, omega]; set 0 <= beta <= omega <= 1, omega > 0")
    return values[0], values[1]


def interval_candidates(block_size: int) -> tuple[Interval, ...]:
    """The intervals that the tuner searches, always in this order; the first is the whole of [1e-3, 1].

    For L' > 1 these are 36: after it widths .5 .6 .7 .8 .9, each from starts in steps of .05. A start at 0 is one at 1e-3:
    validation draws no smaller t, and below it the variance only grows, as log(1 / beta). For L' = 1: [1e-3, 1] and [1, 1].
    """
    if block_size == 1:
        return VALIDATION_INTERVAL, (1.0, 1.0)
    clips = ((start, width) for width in (50, 60, 70, 80, 90) for start in range(0, 101 - width, 5))
    return VALIDATION_INTERVAL, *((max(start / 100, VALIDATION_INTERVAL[0]), (start + width) / 100) for start, width in clips)


def check_tuner(tuner: TunerConfig, objective: ObjectiveConfig) -> None:
    """Refuse a `tuner` section that cannot work with this objective. Raises RecipeError."""
    for key, least in (("every", 1), ("start_step", 0), ("rows", 1)):
        value = getattr(tuner, key)
        if value is not None and value < least:
            raise RecipeError(f"tuner.{key} is {value}; set {least} or more")
    if not 0 <= tuner.margin < 1:
        raise RecipeError(f"tuner.margin is {tuner.margin}, but it is a fraction of the variance; set 0 <= margin < 1, such as 0.02")
    if not tuner.enabled:
        if tuner.kind != "interval":
            raise RecipeError(f"tuner.kind is {tuner.kind}, but the tuner is off; set tuner.enabled=true or tuner.kind=interval")
        return
    kind = objective.traits
    if not kind.has_interval:
        raise RecipeError(f"tuner.enabled is on, but objective.kind={kind.name} has no interval to tune; set tuner.enabled=false")
    if not kind.has_likelihood_bound:
        raise RecipeError(
            f"tuner.enabled is on, but objective.kind={kind.name} has no likelihood bound whose variance could be tuned; set "
            "tuner.enabled=false"
        )
    if objective.noise_schedule != "linear":
        raise RecipeError(
            f"tuner.enabled is on, but its statistic is that of the linear schedule, not of "
            f"objective.noise_schedule={objective.noise_schedule}; set objective.noise_schedule=linear or tuner.enabled=false"
        )
    if tuner.kind != "interval" and objective.resample:
        raise RecipeError(
            f"objective.resample is on, whose loss is no bound that tuner.kind={tuner.kind} could keep; set objective.resample=false "
            "or tuner.kind=interval"
        )
    if tuner.kind != "interval":
        check_draws(objective.draws, objective.pairs, density=f"learned (tuner.kind={tuner.kind})")
    if tuner.kind == "density":
        if objective.interval[0] == objective.interval[1]:
            raise RecipeError(
                f"tuner.kind is density, but objective.interval={list(objective.interval)} is a point; set objective.interval=[0.001,1.0]"
            )
        return
    for size in [size for _, size in block_sizes(objective.block_size)] if kind.in_blocks else [2]:
        if tuple(objective.interval) not in interval_candidates(size):
            of_size = " of block size 1" if size == 1 else ""
            raise RecipeError(
                f"objective.interval is {list(objective.interval)}, but with tuner.enabled it is where the search starts and must be "
                f"one of the candidates{of_size}; set objective.interval=[0.001, 1.0] or tuner.enabled=false"
            )


def check_control_variate(recipe: Recipe) -> None:
    """Raises RecipeError for a control variate of a loss that nothing is known of."""
    if recipe.tracking.control_variate and not recipe.tuner.enabled:
        raise RecipeError(
            "tracking.control_variate is on, but lives on what the tuner measures; set tuner.enabled=true or tracking.control_variate=false"
        )
    if recipe.tracking.control_variate and recipe.objective.resample:
        raise RecipeError(
            "tracking.control_variate is on, but knows only masks that were not drawn by objective.resample; set "
            "tracking.control_variate=false or objective.resample=false"
        )
