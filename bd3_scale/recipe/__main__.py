"""`python -m bd3_scale.recipe [SECTION or KEY]`: keys of a recipe, each with its default, what it may be, and its meaning.

Without an argument it prints the page docs/recipe.md, which a test holds equal. Invariant: all is read from `schema.py` and `network.py`.
"""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import fields
from textwrap import fill
from typing import Any

from bd3_scale.program import run_program
from bd3_scale.recipe.definition import FORMER_NAMES, KEYS, Recipe
from bd3_scale.recipe.keys import Facts
from bd3_scale.recipe.schema import SourceConfig
from bd3_scale.recipe.text import as_yaml

HEAD = """# Keys of a recipe

Made by `bd3 recipe > docs/recipe.md` from `bd3_scale/recipe/schema.py` and `network.py`. In brackets stands what a key may be, and whether
a continued run may change it: *free*, it may; *amend*, from a step on, where `run.amend` names it; else it defines the run and may not."""


def page() -> str:
    """All keys as Markdown, section by section, with what a mixture's sources have behind them."""
    recipe, sources = Recipe(), SourceConfig()
    sections = {part.name: getattr(recipe, part.name) for part in fields(recipe)} | {"A source of data.mixture": sources}
    parts = [HEAD]
    for title, section in sections.items():
        lines = describe(section, "" if section is sources else f"{title}.").values()
        parts += [f"## {title}", " ".join(str(inspect.getdoc(section)).split()), "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts)


def describe(section: Any, prefix: str) -> dict[str, str]:
    """{prefix + key: its line} of a section that holds its defaults. Raises KeyError for a key without a meaning."""
    meanings, lines = meanings_of(type(section)), {}
    for item in fields(section):
        name = prefix + item.name
        facts, default = KEYS.get(name, Facts()), as_yaml(getattr(section, item.name)) or "''"
        may_be = " | ".join(as_yaml(choice) for choice in facts.choices) or str(item.type).replace("None", "null")
        may_be += f", above {facts.above}" if facts.above is not None else ""
        may_be += f", at least {facts.least}" if facts.least is not None else ""
        may_be += f"; *{facts.change}*" if facts.change != "no" else ""
        lines[name] = f"`{name}` = `{default}` ({may_be}): {meanings[item.name]}"
    return lines


def meanings_of(section: type) -> dict[str, str]:
    """{key: the text below it} of a class of the schema."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for item, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(item.target)] = " ".join(str(below.value.value).split())
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the page, or the keys of the sections and the keys that are named."""
    wanted = sys.argv[1:] if arguments is None else arguments
    if wanted in (["-h"], ["--help"]):
        print(f"usage: bd3 recipe [SECTION or KEY ...]\n\n{__doc__}")
        return 0
    if not wanted:
        print(page())
    recipe = Recipe()
    for name in wanted:
        section = name.split(".")[0]
        lines = describe(getattr(recipe, section), f"{section}.") if section in {part.name for part in fields(recipe)} else {}
        found = [line for key, line in lines.items() if FORMER_NAMES.get(name, name) in (key, section)]
        if not found:
            sections = ", ".join(part.name for part in fields(recipe))
            print(f"bd3_scale: error: a recipe has no section or key {name!r}; name one of {sections}, or a key", file=sys.stderr)
            return 2
        print("\n".join(fill(line, 120, subsequent_indent="    ", break_long_words=False) for line in found))
    return 0


if __name__ == "__main__":
    run_program(main)
