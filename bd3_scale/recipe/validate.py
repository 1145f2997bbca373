"""Whether a recipe can work on a number of ranks, before anything is started.

Invariant: what cannot work is a `RecipeError` of one line that names the key, what is wrong and what to set.
"""

from __future__ import annotations

import math

from bd3_scale.errors import RecipeError
from bd3_scale.recipe import rules
from bd3_scale.recipe.environment import resolve_precision
from bd3_scale.recipe.key_rules import CHOICES, NOT_NEGATIVE, POSITIVE, REFUSED_CHOICES
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.suggestions import as_text, as_yaml
from bd3_scale.recipe.text import flatten


def validate(recipe: Recipe, world_size: int = 1, device: str | None = None) -> None:
    """Refuse what cannot work on `world_size` ranks. Raises RecipeError with the first problem found."""
    flat, defaults = flatten(recipe), flatten(Recipe())
    for key, value in flat.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
        _need(finite, f"{key} is {as_yaml(value)} but must be finite; {as_text({key: defaults[key]})}, for example")
    for (key, refused), why in REFUSED_CHOICES.items():
        _need(flat[key] != refused, f"{key} is {refused}, but {why}")
    for key, allowed in CHOICES.items():
        _need(flat[key] in allowed, f"{key} is {flat[key]!r}; set one of {', '.join(str(choice) for choice in allowed)}")
    for key in POSITIVE:
        cure = as_text({key: 1000 if key in ("training.steps", "training.tokens") else defaults[key]})
        _need(flat[key] is None or flat[key] > 0, f"{key} is {flat[key]} but must be above 0; {cure}, for example")
    for key in NOT_NEGATIVE:
        _need(flat[key] >= 0, f"{key} is {flat[key]} but must not be negative; {as_text({key: defaults[key]})}, for example")
    rules.check(recipe, world_size, device, resolve_precision(recipe, device) if device is not None else None)
    from bd3_scale.objectives.interval_tuner import check_tuner
    from bd3_scale.objectives.table import build_objective

    build_objective(recipe.objective, recipe.model.context, mask_id=1, document_end=0 if recipe.data.document_mask else None)
    check_tuner(recipe.tuner, recipe.objective)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)
