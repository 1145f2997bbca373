"""Keys of a recipe: each says what it is, the page of all keys is that of the schema, and documents name no key that there is not."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from bd3_scale.recipe import KEYS, Recipe
from bd3_scale.recipe.__main__ import main, meanings_of, page
from bd3_scale.recipe.definition import FORMER_NAMES
from bd3_scale.recipe.schema import SourceConfig

ROOT = Path(__file__).resolve().parents[3]
SECTIONS = {part.name: type(getattr(Recipe(), part.name)) for part in fields(Recipe)}
NAMED = re.compile(rf"(?<![\w./])({'|'.join(SECTIONS)})\.([a-z_]+)(?![\w/(]|\.\w)")
FILES = {"model.safetensors"}
"""What reads like a key and is none."""


@pytest.mark.parametrize("section", [*SECTIONS.values(), SourceConfig])
def test_every_key_says_what_it_is(section: type) -> None:
    meanings = meanings_of(section)
    assert [item.name for item in fields(section)] == list(meanings) and all(text.endswith(".") for text in meanings.values())


def test_the_page_of_all_keys_is_that_of_the_schema() -> None:
    written = (ROOT / "docs" / "recipe.md").read_text()
    assert written == page() + "\n", "make it anew: bd3 recipe > docs/recipe.md"
    assert re.findall(r"^- `(\w+\.\w+)` = ", written, re.MULTILINE) == list(KEYS)


def test_documents_name_keys_that_exist() -> None:
    pages = [page for folder in (".", "cluster", "docs") for page in (ROOT / folder).glob("*.md")]
    named = {match[0] for page in pages for match in NAMED.finditer(page.read_text())} - FILES
    assert len(named) > 50
    assert {name for name in named if not name.endswith(".md")} <= {*KEYS, *FORMER_NAMES}, named - set(KEYS)


def test_one_section_or_key_is_printed_and_an_unknown_one_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model.mlp", "tracking"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("`model.mlp` = `gelu` (gelu | swiglu | geglu): ")
    assert re.findall(r"^`([\w.]+)` = ", printed, re.MULTILINE) == ["model.mlp", *(key for key in KEYS if key.startswith("tracking."))]
    assert main(["objective.schedule"]) == 0 and capsys.readouterr().out.startswith("`objective.noise_schedule` = ")
    for wrong in ("modle", "model.hiden", "training.betas.0"):
        assert main([wrong]) == 2 and wrong in capsys.readouterr().err
