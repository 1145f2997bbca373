"""A recipe as YAML, as plain dictionaries and as one flat table of dotted keys."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from omegaconf import OmegaConf

from bd3_scale.recipe.schema import Recipe


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe; `load` of it gives the same recipe again."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


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
