"""The facts of a recipe's key that stand beside it in `schema.py`: its default, what it may be, whether a continued run may change it.

Invariant: a fact is written once, there; checks and their errors, the resume check and docs/recipe.md read it. The room `rules` has what
several keys need of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

Value = TypeVar("Value")
Change = Literal["no", "amend", "free"]
"""Whether a continued run may have another value: no, it defines the run; from a step on where `run.amend` names the key; freely."""


@dataclass(frozen=True)
class Facts:
    """What holds of one key besides its type and default. Without any: every value of its type, the same throughout a run."""

    choices: tuple[Any, ...] = ()
    """The only values, where there are any."""
    above: float | None = None
    """Numbers must be above this; null passes."""
    least: float | None = None
    """Numbers must be at least this; null passes."""
    change: Change = "no"
    example: Any = None
    """The value that an error proposes, where the default (None) would not do."""
    refused: Mapping[Any, str] = field(default_factory=dict)
    """Values that people expect to work, each with why it does not and what to set."""
    was: str = ""
    """What the key was called in its section, where it has another name now."""
    former: Mapping[bool, Any] = field(default_factory=dict)
    """A key that once was true or false: what these mean in a saved recipe, and the cure where somebody writes them."""


def key(default: Value, **facts: Any) -> Value:
    """A field of a section, with the keywords of `Facts`."""
    noted = {"facts": Facts(**facts)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy(default), metadata=noted)
    return field(default=default, metadata=noted)


def section(kind: Callable[[], Value], change: Change = "no") -> Value:
    """A field of the recipe: one section, by its class. `change` holds for all of its keys, unless it is no."""
    return field(default_factory=kind, metadata={"facts": Facts(change=change)})


def facts_of(recipe: type[Any]) -> dict[str, Facts]:
    """{dotted key: its facts}, in the order of the sections."""
    found, plain = {}, recipe()
    for part in fields(plain):
        shared = part.metadata["facts"].change
        for item in fields(getattr(plain, part.name)):
            facts = item.metadata.get("facts", Facts())
            found[f"{part.name}.{item.name}"] = facts if shared == "no" else replace(facts, change=shared)
    return found
