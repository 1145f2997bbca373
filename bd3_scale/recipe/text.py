"""A recipe as YAML, as plain dictionaries and as one flat table of dotted keys."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from omegaconf import OmegaConf

from bd3_scale.recipe.definition import Recipe


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe; `load` of it gives the same recipe again."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))  # half the time of a structured one, whose types nobody asks for


def flatten(recipe: Recipe) -> dict[str, Any]:
    """{dotted key: value}."""
    return {
        f"{section.name}.{item.name}": getattr(getattr(recipe, section.name), item.name)
        for section in fields(recipe)
        for item in fields(getattr(recipe, section.name))
    }


def as_dictionary(recipe: Recipe) -> dict[str, Any]:
    """{section: {key: value}}."""
    return asdict(recipe)


def as_text(changes: dict[str, Any]) -> str:
    return "set " + " and ".join(f"{key}={as_yaml(value)}" for key, value in changes.items())


def as_yaml(value: Any) -> str:
    """A value as a person types it in a recipe or as an override."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(as_yaml(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {as_yaml(item)}' for name, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
