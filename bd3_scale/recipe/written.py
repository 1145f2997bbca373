"""What a recipe says, before YAML makes values of it: text stays as it was written, and a number is no other than it looks.

YAML takes 0012 for ten, 12:30:00 for 45000 seconds, 1e5 for a number and `on` for true. Invariants: a key whose type is text takes what was
written, character for character, plain or quoted, from a file and from the command line; a number with leading zeros or colons is a
`RecipeError`; a key by its former name is that key, also in `run.amend` and in ${...}; everything else is as in YAML.
"""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from bd3_scale.errors import RecipeError, one_line
from bd3_scale.launcher import launched
from bd3_scale.messages import log
from bd3_scale.recipe.definition import FORMER_NAMES, KEYS, Recipe

_TEXT, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_REFERENCE = re.compile(r"(?<=\$\{)[\w.]+(?=\})")


def written_recipe(text: str, note: bool = True) -> str:
    """The YAML of a recipe with its texts quoted; a `note` names former names. Raises RecipeError, yaml.YAMLError."""
    node = yaml.compose(text, yaml.SafeLoader)
    return "" if node is None else _quoted(node, Recipe, "", note)


def written_override(item: str) -> str:
    """`dotted.key=value` with its texts quoted. Raises RecipeError."""
    key, _, value = item.partition("=")
    key = _today(key)
    try:
        node = yaml.compose(value, yaml.SafeLoader)
    except yaml.YAMLError as error:
        why = one_line(getattr(error, "problem", None) or error)
        raise RecipeError(
            f"override {item!r} is not YAML ({why}); quote the value: {key}='...', inside of the quotes of the shell"
        ) from None
    if node is None:
        return f"{key}={value}"
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        node.value = value  # with what would be a comment
    kind: Any = Recipe
    for part in re.split(r"[.\[\]]+", key.rstrip("]")):
        kind = _below(kind, part)
    return f"{key}={_quoted(node, kind, key)}"


def _today(key: str, note: bool = True) -> str:
    """A dotted key by its name of today."""
    today = FORMER_NAMES.get(key, key)
    if today != key and note and launched().rank == 0:
        log.info(f"{key} is called {today} now, and read as that")
    return today


def _quoted(node: yaml.Node, kind: Any, key: str, note: bool = True) -> str:
    _check(node, kind, key, note)
    written: str = yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True, width=float("inf"))
    return written


def _check(node: yaml.Node, kind: Any, key: str, note: bool) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, _ in node.value:
            if f"{key}.{name.value}" in FORMER_NAMES:
                name.value = _today(f"{key}.{name.value}", note).rpartition(".")[2]
        names = [name.value for name, _ in node.value]
        for name, value in node.value:
            if names.count(name.value) > 1:
                raise RecipeError(f"{key or 'the recipe'} has {name.value} twice; keep one of them")
            _check(name, get_args(kind)[0] if get_origin(kind) is dict else None, key, note)
            _check(value, _below(kind, name.value), f"{key}.{name.value}".lstrip("."), note)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check(value, _below(kind, ""), key, note)
    if not isinstance(node, yaml.ScalarNode):
        return
    if key == "run.amend":
        node.value = _today(node.value, note)
    node.value = _REFERENCE.sub(lambda found: _today(found[0], note), node.value)
    if node.style is None and "${" not in node.value:
        kinds = get_args(kind) or (kind,)
        former = key in KEYS and KEYS[key].former
        if str in kinds and node.value and not former and not (NoneType in kinds and node.tag == _NULL):
            node.tag, node.style = _TEXT, "'"
        elif _OCTAL.fullmatch(node.value):
            raise RecipeError(f"{key} is {node.value}, but a number has no leading zeros; set {key}={int(node.value.replace('_', ''))}")
        elif _SEXAGESIMAL.fullmatch(node.value):
            raise RecipeError(
                f"{key} is {node.value}, but a number has no colons; write the number itself, or of a mapping a space behind its colon"
            )


def _below(kind: Any, name: str) -> Any:
    """The type of a section's key, or of a list's or mapping's values; None: not known."""
    if is_dataclass(kind) and isinstance(kind, type):
        return get_type_hints(kind).get(name)
    return get_args(kind)[-1] if get_origin(kind) in (list, dict) else None
