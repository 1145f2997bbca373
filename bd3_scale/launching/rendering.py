"""The templates in `templates/`, filled in: every value is quoted for the language that it lands in, by default and always.

Invariants: a placeholder without a value is an error; what a user wrote (a name, a path, an override) never becomes shell or YAML
syntax, since the environment quotes what it prints and only `| raw` - for numbers, and for shell lines that are meant as such -
does not; the same values give the same bytes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


class Raw(str):
    """Text that is printed as it is."""


def shell(value: Any) -> str:
    """One word of a shell command, or several for a list."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, (list, tuple)):
        return " ".join(shlex.quote(str(word)) for word in value)
    return shlex.quote(str(value))


def yaml_scalar(value: Any) -> str:
    """A double-quoted YAML scalar, number, or flow sequence or mapping of them, on one line (JSON is YAML, but for characters that
    YAML takes for line ends or does not allow)."""
    if isinstance(value, Raw):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)


QUOTING: dict[str, Callable[[Any], str]] = {".sbatch": shell, ".yaml": yaml_scalar}


def render(name: str, values: dict[str, Any]) -> str:
    """The text of template `name` (relative to templates/, for example slurm/train.sbatch)."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        finalize=QUOTING[Path(name).suffix],
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["raw"] = lambda value: Raw(str(value))
    return environment.get_template(name).render(values)
