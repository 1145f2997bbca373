"""Whether a recipe may continue a run that was begun with another one: every key says in `schema.py` whether it may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bd3_scale.batches import BatchSchedule
from bd3_scale.errors import RecipeError
from bd3_scale.recipe.definition import KEYS, Recipe
from bd3_scale.recipe.objective_kinds import block_sizes
from bd3_scale.recipe.text import flatten


def compare(saved: Recipe, asked: Recipe, step: int, since: Mapping[str, int] | None = None) -> dict[str, tuple[Any, Any]]:
    """Refuse to continue a run at `step` under a recipe that would make it another run. Raises RecipeError naming the first
    such key. Block sizes and batches of later steps may change: the past must be as it was. Returns what `run.amend` lets change:
    {key: (saved, asked)}. `since`: the steps at which keys were amended before."""
    amended = {}
    before, now = flatten(saved), flatten(asked)
    for flat in (before, now):
        flat["data.mixture"] = [source.weight for source in flat["data.mixture"]]  # where they lie may change, as data.path
        if not isinstance(sizes := flat["objective.block_size"], dict):
            flat["objective.block_size"] = [list(stage) for stage in block_sizes(sizes) if stage[0] < max(step, 1)]
    if _past_batches(saved.batches, step) == _past_batches(asked.batches, step):
        now["training.global_batch"] = before["training.global_batch"]
    for key, value in now.items():
        if KEYS[key].change == "free" or before.get(key) == value:
            continue
        if key not in asked.run.amend:
            amended_at = f" since step {since[key]}" if since and key in since else ""
            amend = f", or run.amend=[{key}] to change it from step {step} on" if KEYS[key].change == "amend" else ""
            raise RecipeError(
                f"{key} is {value} but the run being continued has {before.get(key)}{amended_at}, and it defines the run; "
                f"set {key}={before.get(key)} or another run.dir{amend}"
            )
        amended[key] = before.get(key), value
    return amended


def _past_batches(batches: BatchSchedule, step: int) -> list[tuple[int, int]]:
    return [(phase.step, phase.rows) for phase in batches.phases if phase.step < max(step, 1)]
