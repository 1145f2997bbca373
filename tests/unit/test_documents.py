"""What the README, the guide for clusters and the pages of docs/ tell people to type works: commands are parsed, recipes validated.

A command is a line of a shell block, or one in backticks inside of the text. It is handed to the parser of its own `main`; recipes are
then read with their overrides and validated on as many ranks as the command starts; jobs of clusters are rendered.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bd3_scale import recipe as recipes
from bd3_scale.rules.validate import validate

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]
BLOCK = re.compile(r"^```(?:sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:bd3 |python (?:-m bd3_scale|tools/)|torchrun [^`]* -m )[^`]*)`")
OURS = re.compile(r"^bd3 \w|-m bd3_scale\.|tools/\w+\.py")
OTHERS_PARSE = ("bd3_scale.evaluation.harness",)
"""Commands of lm-evaluation-harness, which is not installed here."""


@dataclass(frozen=True)
class Command:
    module: str
    words: tuple[str, ...]
    ranks: int

    @classmethod
    def read(cls, line: str) -> Command | None:
        """A line of a shell -> what it starts of this repository; None: something else."""
        words = [word for word in shlex.split(line, comments=True) if word not in ("&", ">")]
        if not OURS.search(" ".join(words)):
            return None
        sizes = [words[words.index(name) + 1] if name in words else "1" for name in ("--nnodes", "--nproc-per-node")]
        ranks = int(sizes[0].split(":")[0]) * int(sizes[1])
        if words[0] == "bd3":
            words = [words[0], f"bd3_scale.{words[1]}", *words[2:]]
        place = next(place for place, word in enumerate(words) if word.startswith(("bd3_scale.", "tools/")))
        return cls(words[place].removeprefix("tools/").removesuffix(".py"), tuple(words[place + 1 :]), ranks)


def lines(text: str) -> Iterator[str]:
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part for part in line.split(" && ") if not part.lstrip().startswith("#"))
    for line in INLINE.findall(BLOCK.sub("", text)):
        yield line.split(" > ")[0]


def commands() -> Iterator[Any]:
    seen = set()
    for page in PAGES:
        for line in lines(page.read_text()):
            command = None if "..." in line else Command.read(line)
            if command is not None and command not in seen:
                seen.add(command)
                yield pytest.param(command, id=f"{page.relative_to(ROOT)}: {line.strip()[:100]}")


class Parsed(BaseException):
    """Thrown out of a command when its words were understood."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


@pytest.mark.parametrize("command", commands())
def test_commands_are_taken(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, words = command.module, list(command.words)
    if module in OTHERS_PARSE:
        assert importlib.util.find_spec(module)
        return
    main = importlib.import_module(f"{module}.__main__" if module in ("bd3_scale.recipe", "bd3_scale.convert") else module).main
    if not words or "--help" in words:
        return
    if module == "bd3_scale.recipe":
        assert main(words) == 0
    elif module == "bd3_scale.launch":
        monkeypatch.chdir(tmp_path)
        (tmp_path / "recipes").symlink_to(ROOT / "recipes")
        assert main(words if "--write" in words else [*words, "--dry-run"]) == 0
    else:
        _validate_recipe(module, _parsed(main, words, monkeypatch), command.ranks)


def _parsed(main: Callable[[list[str]], int], words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What a command understands of its words, without doing it: its parser, when it has taken all of them (and not the first alone, to
    find out what the others are), ends it."""

    def ended(original: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
        def parse(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> argparse.Namespace:
            options = original(parser, args, namespace)
            if len(args) > 1 or args == words:
                raise Parsed(options)
            return options

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, ended(getattr(argparse.ArgumentParser, name)))
    with pytest.raises(Parsed) as parsed:
        main(words)
    return parsed.value.options


def _validate_recipe(module: str, options: argparse.Namespace, ranks: int) -> None:
    """Of a command that has one, on either device."""
    if module.startswith("bd3_scale.") and getattr(options, "recipe", None):
        path = ROOT / options.recipe
        if path.parts[-3] == "runs":  # the recipe of a run, which was trained by another command of the page
            path = ROOT / "recipes" / "quickstart.yaml"
        if module == "bd3_scale.convert":  # of the network that is imported, which is not here
            recipes.load(options.recipe)
            return
        recipe = recipes.load(path, options.overrides)
        for device in ("cpu", "cuda") if module != "bd3_scale.doctor" else ():  # which looks at the machine, whatever the job's size
            validate(recipe, getattr(options, "world_size", ranks), device)


@pytest.mark.parametrize("page", [page for page in PAGES if "```yaml" in page.read_text()], ids=lambda page: page.name)
def test_recipes_in_the_text_are_valid(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        validate(recipes.load(path), 1, "cpu")


def test_the_commands_are_found() -> None:
    """Nothing that starts this package is passed over, in any way of writing it."""
    found = [item.values[0] for item in commands()]
    assert len(found) > 60 and {1, 2, 4, 64} <= {command.ranks for command in found}
    named = {"train", "plan", "launch", "prepare", "convert", "sample", "evaluate", "doctor", "inspect", "recipe"}
    assert {f"bd3_scale.{verb}" for verb in named} | {"reproduce"} <= {command.module for command in found}


def test_messages_of_the_page_are_those_of_the_code() -> None:
    said = set()
    for path in (ROOT / "bd3_scale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    text = "\n".join(said)
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 25
    parts = [part.strip() for row in rows for part in row.split("...") if part.strip()]
    assert not [part for part in parts if part not in text]
