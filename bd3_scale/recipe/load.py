"""Reading a recipe: defaults, then the YAML file, then dotted overrides.

Invariants: an unknown key or a wrong type is a `RecipeError` of one line that names the key, what is wrong and what to set;
nothing is silently changed; nothing here touches torch.distributed.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bd3_scale.errors import RecipeError
from bd3_scale.recipe.definition import KEYS, Recipe
from bd3_scale.recipe.environment import compiled_in_pieces
from bd3_scale.recipe.shipped import shipped
from bd3_scale.recipe.text import as_text, as_yaml
from bd3_scale.recipe.written import written_override, written_recipe


def load(path: str | Path, overrides: list[str] | None = None, *, saved: bool = False) -> Recipe:
    """Defaults, then the YAML file (a path, or the name of a shipped recipe), then `dotted.key=value` overrides. Raises RecipeError; does
    not `validate`.

    `saved`: the file was written by this program, maybe by an earlier version: former values are read as what they mean now, and no note
    says which names are former ones.
    """
    path = Path(path)
    if not path.exists() and str(path) in (recipes := shipped()):
        path = recipes[str(path)]
    try:
        text = OmegaConf.load(io.StringIO(written_recipe(path.read_text("utf-8-sig"), note=not saved)))
    except RecipeError:
        raise
    except FileNotFoundError:
        names = ", ".join(shipped())
        raise RecipeError(f"recipe {path} does not exist; name a YAML file" + (f", or one of {names}" if names else "")) from None
    except IsADirectoryError:
        raise RecipeError(f"recipe {path} is a folder; name the YAML file inside it") from None
    except Exception as error:  # YAML errors have no common base that OmegaConf exports
        raise RecipeError(f"recipe {path} is not valid YAML: {_one_line(error)}; fix that line") from None
    if not isinstance(text, DictConfig):
        raise RecipeError(f"recipe {path} must hold sections such as `model:` and `training:`, not {type(text).__name__}")
    for item in overrides or []:
        key, sign, _ = item.partition("=")
        if not sign or not key or key.startswith("-"):
            raise RecipeError(f"override {item!r} must have the form dotted.key=value, without dashes")
    overrides = [written_override(item) for item in overrides or []]
    if saved:
        _renew(text)
    try:
        written = text, OmegaConf.from_dotlist(_replacing(text, overrides))
        for part in written:
            _check_written(OmegaConf.to_container(part, resolve=False))
        merged = OmegaConf.merge(_defaults(), *written)
        OmegaConf.resolve(merged)
        recipe = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        full_key = getattr(error, "full_key", None)
        where = f"{full_key}: " if full_key else ""
        raise RecipeError(f"{where}{_one_line(error)}; see bd3 recipe for all keys") from None
    assert isinstance(recipe, Recipe)
    if isinstance(recipe.training.global_batch, str):  # of an environment variable
        with contextlib.suppress(ValueError):
            recipe.training.global_batch = json.loads(recipe.training.global_batch)
    if compiled_in_pieces(recipe.training, recipe.parallel) and recipe.parallel.engine == "auto":
        recipe.parallel.engine = "fsdp"
    return recipe


@cache
def _defaults() -> DictConfig:
    """All keys with their types; whoever merges into it gets a copy."""
    return OmegaConf.structured(Recipe)


def _replacing(text: DictConfig, overrides: list[str]) -> list[str]:
    """The overrides, where a mapping stands instead of what the recipe and earlier overrides have at its key, and what is written for a key
    instead of a mapping; OmegaConf would merge the two."""
    kept: list[str] = []
    before = OmegaConf.to_container(text, resolve=False)
    for item in overrides:
        key = item.partition("=")[0]
        section, _, name = key.partition(".")
        if name and "." not in name:
            kept = [other for other in kept if not other.startswith((f"{key}=", f"{key}."))]
            of_section = before.get(section) if isinstance(before, dict) else None
            if isinstance(of_section, dict) and isinstance(of_section.get(name), dict):
                text[section].pop(name, None)
        kept.append(item)
    return kept


def _renew(text: DictConfig) -> None:
    """Replace former values of keys by today's."""
    for key, facts in KEYS.items():
        value = OmegaConf.select(text, key) if facts.former else None
        if isinstance(value, bool):
            OmegaConf.update(text, key, facts.former[value])


def _check_written(written: Any) -> None:
    """Refuse what OmegaConf would take for something else (3 for true) or refuse without naming the key."""
    for section in fields(Recipe):
        if section.name not in written:
            continue
        values, plain = written[section.name], getattr(Recipe(), section.name)
        types = get_type_hints(type(plain))
        if not isinstance(values, dict):
            example = as_text({f"{section.name}.{name}": getattr(plain, name) for name in list(types)[:1]})
            raise RecipeError(f"{section.name} is {as_yaml(values)} but is a section; {example} and so on, each key by itself")
        for name, value in values.items():
            key, kind = f"{section.name}.{name}", types.get(name)
            if isinstance(value, str) and "${" in value:
                continue  # known only when it is resolved
            if kind is bool and not isinstance(value, bool):
                raise RecipeError(f"{key} is {as_yaml(value)} but must be true or false; set {key}=true, or set {key}=false")
            if isinstance(value, bool) and key in KEYS and KEYS[key].former:
                choices, cure = ", ".join(KEYS[key].choices), as_text({key: KEYS[key].former[value]})
                raise RecipeError(f"{key} is {as_yaml(value)} but is one of {choices}; {cure} for what {as_yaml(value)} was")
            if get_origin(kind) is dict and not (isinstance(value, dict) and all(isinstance(one, str) and one for one in value.values())):
                raise RecipeError(f"{key} is {as_yaml(value)} but must give names their paths; set {key}={{NAME: FOLDER}}")
            if get_origin(kind) is tuple:
                numbers = value if isinstance(value, list) else []
                if len(numbers) != len(get_args(kind)) or not all(type(one) in (int, float) or "${" in str(one) for one in numbers):
                    example = as_text({key: getattr(plain, name)})
                    raise RecipeError(f"{key} is {as_yaml(value)} but must be {len(get_args(kind))} numbers; {example}, for example")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(("full_key:", "object_type=", "reference_type=")))
