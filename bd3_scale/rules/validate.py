"""Whether a recipe can work on a number of ranks, before anything is started.

Invariant: what cannot work is a `RecipeError` of one line that names the key, what is wrong and what to set.
"""

from __future__ import annotations

import math
from typing import Any

from bd3_scale.errors import RecipeError
from bd3_scale.recipe.definition import KEYS, Recipe
from bd3_scale.recipe.environment import resolve_precision
from bd3_scale.recipe.stages import batch_schedule
from bd3_scale.recipe.text import as_text, as_yaml, flatten
from bd3_scale.rules import across_keys
from bd3_scale.rules.objective import check_control_variate, check_objective, check_tuner


def validate(recipe: Recipe, world_size: int = 1, device: str | None = None) -> None:
    """Refuse what cannot work on `world_size` ranks. Raises RecipeError with the first problem found."""
    defaults = flatten(Recipe())
    for key, value in flatten(recipe).items():
        _check_key(key, value, defaults[key])
    batch_schedule(recipe.training.global_batch, recipe.objective.draws)
    across_keys.check(recipe, world_size, device, resolve_precision(recipe.training, device) if device is not None else None)
    check_objective(recipe.objective, recipe.model.context, recipe.data.document_mask)
    check_tuner(recipe.tuner, recipe.objective)
    check_control_variate(recipe)


def _check_key(key: str, value: Any, default: Any) -> None:
    """What holds of one key, whatever the others are."""
    facts = KEYS[key]
    cure = as_text({key: default if facts.example is None else facts.example})
    numbers = value if isinstance(value, (list, tuple)) else [value]
    finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
    _need(finite, f"{key} is {as_yaml(value)} but must be finite; {cure}, for example")
    if facts.choices:
        _need(value not in facts.refused, f"{key} is {value}, but {facts.refused.get(value)}")
        _need(value in facts.choices, f"{key} is {value!r}; set one of {', '.join(str(choice) for choice in facts.choices)}")
    if facts.above is not None and value is not None:
        _need(value > facts.above, f"{key} is {value} but must be above {facts.above}; {cure}, for example")
    if facts.least is not None and value is not None:
        wrong = "must not be negative" if facts.least == 0 else f"must be at least {facts.least}"
        _need(value >= facts.least, f"{key} is {value} but {wrong}; {cure}, for example")


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)
