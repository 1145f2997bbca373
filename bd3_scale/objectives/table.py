"""What goes into the network, what is scored, and with which weight: the class of each kind, and the objective of every step of a run.

An objective lays rows of data tokens out as `NetworkInputs` on the host; the network answers with one negative
log-likelihood (nll; of `sedd` a score entropy, which bounds it) per selected position. Two numbers come of that and are never mixed:

    train loss = sum(weight * nll) / (global_batch * (L - 1)), over all ranks and micro-batches, at the training interval; each draw of a
                 row is one of the batch;
    NELBO      = the same quotient over the held-out rows at t ~ U[1e-3, 1], linear schedule, fixed noise: nats per data token.

`ssdlm` has no NELBO: its quotient over the held-out rows is a cross-entropy, and is called so.

Invariants: diffusion targets are not shifted (position i predicts token i), those of `ar` are (i predicts i + 1); one t
per block; token 0 of a row is never masked and never counted; division is by data tokens, never by masked ones; nothing
here depends on rank or micro-batch. An objective is a value without state: a run changes its block size or interval by
taking another one from its `ObjectiveSchedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from bd3_scale.errors import RecipeError
from bd3_scale.keyed_random import raw_words, uniform
from bd3_scale.objectives.ar import Autoregressive
from bd3_scale.objectives.base import Objective, ObjectiveBase
from bd3_scale.objectives.bd3 import BlockDiffusion
from bd3_scale.objectives.mdlm import MaskedDiffusion
from bd3_scale.objectives.network_inputs import NetworkInputs, row_nelbo
from bd3_scale.objectives.sedd import ScoreEntropy
from bd3_scale.objectives.ssdlm import SimplexDiffusion
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.definition import FORMER_NAMES
from bd3_scale.recipe.objective_kinds import KINDS, ROW_MULTIPLE, SELECTED_MULTIPLE, Kind
from bd3_scale.recipe.schema import ObjectiveConfig, ParallelConfig
from bd3_scale.rules.objective import Interval, check_objective

__all__ = [
    "Autoregressive",
    "BlockDiffusion",
    "MaskedDiffusion",
    "NetworkInputs",
    "Objective",
    "ObjectiveSchedule",
    "ScoreEntropy",
    "SimplexDiffusion",
    "register_objective",
    "row_nelbo",
]

Class = TypeVar("Class", bound=type[ObjectiveBase])

OBJECTIVES: dict[str, type[ObjectiveBase]] = {
    objective.traits.name: objective for objective in (BlockDiffusion, MaskedDiffusion, ScoreEntropy, SimplexDiffusion, Autoregressive)
}
"""objective.kind -> its class."""


def register_objective(traits: Kind) -> Callable[[Class], Class]:
    """Class decorator: recipes may name this class, a frozen dataclass that is an `Objective`, as `objective.kind=<traits.name>`.

    The class is built from those of its fields that are named as a key of `objective` (`block_size` is the one of its step), `mask_id`,
    `context`, `pad_to`, `document_end` or `row_multiple`. Raises ValueError for a name that is taken, or of a key by its former name.
    """

    def register(objective: Class) -> Class:
        if traits.name in KINDS:
            raise ValueError(f"the objective kind {traits.name!r} exists already; register {objective.__name__} under another name")
        for name in (*traits.unused_keys, *(field.name for field in fields(objective))):  # type: ignore[arg-type]  # as the docstring says
            if today := FORMER_NAMES.get(f"objective.{name}"):
                raise ValueError(f"{objective.__name__} and its row call {today} {name!r}, its former name; rename it")
        objective.traits = traits
        KINDS[traits.name], OBJECTIVES[traits.name] = traits, objective
        return objective

    return register


class ObjectiveSchedule:
    """The objective of every step of a run: its stage of `objective.block_size`, or the one of a mixture that the step draws, on the
    interval that is tuned or the recipe's."""

    def __init__(
        self,
        config: ObjectiveConfig,
        context: int,
        mask_id: int,
        pad_to: int = 1,
        document_end: int | None = None,
        row_multiple: int = 1,
        seed: int = 0,
    ) -> None:
        """For rows of `context` tokens. `document_end`: the token that ends a document, where documents are kept apart. `row_multiple`:
        see `base.block_pattern`. `seed`: of the draws of a mixture. Raises RecipeError for what cannot work at some step."""
        check_objective(config, context, document_end is not None)
        values: dict[str, Any] = {item.name: getattr(config, item.name) for item in fields(config)}
        values |= {"context": context, "mask_id": mask_id, "pad_to": pad_to, "document_end": document_end, "row_multiple": row_multiple}
        made: Any = OBJECTIVES[config.kind]
        taken = [item.name for item in fields(made) if item.init and item.name in values]
        if config.draws > 1 and "draws" not in taken:
            raise RecipeError(f"objective.draws is {config.draws}, but {made.__name__} draws noise once a row; set objective.draws=1")
        self._of_size: dict[int, Any] = {}
        for size in sorted(config.sizes(context)):
            values["block_size"] = size
            self._of_size[size] = made(**{name: values[name] for name in taken})
        self._stages, self._seed = config.stages(context), seed
        self.shares = config.shares(context)
        """{block size: share of the updates} of a mixture, the largest share first; else one entry."""

    @classmethod
    def of(cls, recipe: Recipe, mask_id: int, document_end: int | None = None, device: str = "cpu") -> ObjectiveSchedule:
        """That of a recipe, in shapes for `device`; rows end documents with `document_end`, which only data.document_mask heeds."""
        parallel = recipe.parallel
        ranks = parallel.tensor if parallel.sequence else 1
        if parallel.context > 1:  # which hold equal parts of the clean half: it is never cut
            ranks = math.lcm(ranks, recipe.model.context)
        return cls(
            recipe.objective,
            recipe.model.context,
            mask_id,
            selected_multiple(parallel, device),
            document_end if recipe.data.document_mask else None,
            math.lcm(ROW_MULTIPLE[device], ranks),
            recipe.run.seed,
        )

    def at(self, step: int, interval: Interval | None = None, **tuned: tuple[float, ...]) -> Objective:
        """The objective of update `step` (updates done before it), on `interval` (None: the recipe's), with what else was `tuned`: fields
        of its class, left out where they say nothing. Asking at every step costs nothing: equal arguments give the same object."""
        return self.of_size(self.size_at(step), interval, **tuned)

    def size_at(self, step: int) -> int:
        """The block size of update `step`; of a mixture a function of (seed, step) alone."""
        if len(self.shares) == 1:
            return [size for start, size in self._stages if start <= step][-1]
        place = float(uniform(raw_words(self._seed, "block size", (step,), 1))[0])
        borders = np.cumsum(list(self.shares.values()))
        return list(self.shares)[min(int(np.searchsorted(borders, place, side="right")), len(borders) - 1)]

    def of_size(self, size: int, interval: Interval | None = None, **tuned: tuple[float, ...]) -> Objective:
        """The objective of one of the run's block sizes, as `at`."""
        objective: Any = self._of_size[size]
        if interval is None or not objective.traits.has_interval:
            return objective
        return _on(objective, (interval[0], interval[1]), **{name: value for name, value in tuned.items() if value})


def selected_multiple(parallel: ParallelConfig, device: str) -> int:
    """What the number of selected positions of a micro-batch is padded to: sequence parallelism divides them over its ranks."""
    return math.lcm(SELECTED_MULTIPLE[device], parallel.tensor if parallel.sequence else 1)


@lru_cache(maxsize=64)
def _on(objective: Any, interval: Interval, **tuned: tuple[float, ...]) -> Any:
    return replace(objective, interval=interval, **tuned)
