"""One command for everything, and messages that name only what exists after `pip install`."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bd3_scale
from bd3_scale.__main__ import VERBS, main
from bd3_scale.errors import RecipeError
from bd3_scale.recipe import load, shipped

PACKAGE = Path(bd3_scale.__file__).parent


def messages() -> Iterator[tuple[str, str]]:
    """(where, text) of every string of the package that is no docstring; what a text is filled with is VALUE."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        nodes = list(ast.walk(tree))
        parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        described = {id(node.value) for node in nodes if isinstance(node, ast.Expr)} | parts
        for node in nodes:
            where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                yield where, "".join(str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
                yield where, node.value


def test_messages_name_commands_that_are_installed() -> None:
    wrong, verbs, modules = [], set(), set()
    for where, text in messages():
        verbs |= {(where, verb) for verb in re.findall(r"(?<!=)\bbd3 ([a-z]+)", text)}
        modules |= {(where, module) for module in re.findall(r"python -m (bd3_scale[\w.]*\w)", text)}
        wrong += [f"{where}: {name}" for name in re.findall(r"tools/\w+\.py", text)]
    wrong += [f"{where}: bd3 {verb}" for where, verb in verbs if verb not in VERBS]
    wrong += [f"{where}: {module}" for where, module in modules if importlib.util.find_spec(module) is None]
    assert not wrong and len(verbs) > 20 and modules, wrong


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """What `bd3 WORDS --help` prints."""

    def help_of(words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bd3", *words.split(), "--help"])
        with contextlib.suppress(SystemExit):
            main()
        return capsys.readouterr().out

    return help_of


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # other tests have imported the verbs
def test_every_verb_helps_and_has_the_options_that_messages_name(helped: Callable[[str], str]) -> None:
    helps = {words: helped(words) for words in (*VERBS, "launch slurm", "convert import", "convert export", "evaluate likelihood")}
    assert all(text.startswith(f"usage: bd3 {words}") for words, text in helps.items())
    named = {
        (where, verb, option)
        for where, text in messages()
        for verb, rest in re.findall(r"(?<!=)\bbd3 ([a-z]+)([^`;,()]*)", text)
        for option in re.findall(r"--[a-z][a-z-]*", rest)
    }
    assert len(named) > 5
    assert not [one for one in named if not any(one[2] in text for words, text in helps.items() if words.split()[0] == one[1])]


def test_what_is_no_verb_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bd3", "trian"])
    assert main() == 2
    assert capsys.readouterr().err.endswith("bd3 train, for example\n")
    monkeypatch.setattr(sys, "argv", ["bd3", "--version"])
    assert main() == 0 and bd3_scale.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("words", [["recipe"], ["recipe", "data.path"]], ids=["more than a buffer", "less"])
def test_a_reader_that_has_enough_is_no_error(words: list[str]) -> None:
    process = subprocess.Popen([sys.executable, "-m", "bd3_scale", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_a_shipped_recipe_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("quickstart") == load(PACKAGE.parent / "recipes/quickstart.yaml")
    Path("quickstart").write_text("run: {name: mine}")
    assert load("quickstart").run.name == "mine"
    with pytest.raises(RecipeError, match=r"or one of .*quickstart"):
        load("quickstrat")


def test_a_wheel_finds_its_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checkout around the package, they lie where the installer put its data."""
    monkeypatch.setattr(shipped, "CHECKOUT", Path("/nowhere/recipes"))
    file = importlib.metadata.PackagePath("../../../share/bd3_scale/recipes/owt_1b.yaml")
    file.dist = importlib.metadata.distribution("bd3_scale")
    monkeypatch.setattr(shipped.metadata, "files", lambda name: [file, importlib.metadata.PackagePath("bd3_scale/train.py")])
    assert list(shipped.shipped()) == ["owt_1b"]
