"""Arrows between the rooms of the package run down only: the table of docs/architecture.md, the imports read by `ast`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import bd3_scale.__main__

LAZY = bd3_scale._PUBLIC
"""Names of bd3_scale/__init__.py, which is on no floor, and where they come from."""
ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bd3_scale"
VERBS = {"__main__", "api", "cli", *bd3_scale.__main__.VERBS} - {"convert", "recipe"}
"""The commands, above everything; what they share among themselves is theirs; convert and recipe are rooms, with a command each."""


def floors() -> list[str]:
    """Rooms of that table from the ground up."""
    table = (ROOT / "docs" / "architecture.md").read_text().partition("<!-- floors -->\n\n")[2].partition("\n\n")[0]
    return re.findall(r"^\| `bd3_scale/(\w+)(?:\.py)?`", table, re.MULTILINE)


def rooms() -> set[str]:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    return folders | {path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of the package that a file imports, anywhere in it, also for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "bd3_scale":
            yield from ((node.lineno, LAZY.get(item.name, f"bd3_scale.{item.name}")) for item in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bd3_scale."):
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, item.name) for item in node.names if item.name.startswith("bd3_scale."))


def test_every_room_has_its_floor() -> None:
    assert sorted(floors()) == sorted(rooms() - set(VERBS))


def test_imports_run_down_only() -> None:
    height = {room: floor for floor, room in enumerate(floors())} | dict.fromkeys(VERBS, len(floors()))
    seen, upward = 0, []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__":
            continue
        for line, name in imports(path):
            target = name.split(".")[1]
            if target in height:  # else a constant of bd3_scale/__init__.py
                seen += 1
                upward += [f"{path.relative_to(ROOT)}:{line} imports {name}"] * (height[target] > height[room])
    assert not upward, "\n".join(upward)
    assert seen > 300, "the imports are not found"


def test_rooms_and_files_stay_small_enough_to_be_read() -> None:
    """Only `data` is larger, whose rooms are its own folders."""
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > 450}
    rooms = {path.name: sum(count for file, count in lines.items() if path in file.parents) for path in PACKAGE.iterdir() if path.is_dir()}
    assert not {name: count for name, count in rooms.items() if count > 2000 and name != "data"}


def test_the_ground_imports_nothing() -> None:
    """`import bd3_scale` names where its public names lie, for type checkers, and imports none of it."""
    assert {name for _, name in imports(PACKAGE / "__init__.py")} == set(LAZY.values())
