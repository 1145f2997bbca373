"""Checkpoints of every format that was ever written continue: the run goes on as the program that wrote the first of them did.

tests/golden/checkpoints: `format_1` by commit 02c66ec, `format_2` since, both after 3 of the 6 steps of recipe.yaml on corpus.jsonl;
metrics.jsonl is what 02c66ec said of all six.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint.index import FORMAT_VERSION
from bd3_scale.data.preparation.prepare import Packing
from bd3_scale.data.preparation.prepare_corpus import Corpus, prepare_corpus
from bd3_scale.data.tokenizer import ByteTokenizer
from bd3_scale.rules.validate import validate
from bd3_scale.train import train

FORMER = Path(__file__).parents[2] / "golden" / "checkpoints"
FORMATS = sorted(path.name for path in FORMER.glob("format_*"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_there_is_one_of_every_format() -> None:
    assert [f"format_{number}" for number in range(1, FORMAT_VERSION + 1)] == FORMATS
    for name in FORMATS:
        index = json.loads((FORMER / name / "step_00000003" / "index.json").read_text())
        assert f"format_{index['format_version']}" == name


@pytest.mark.parametrize("name", FORMATS)
def test_a_former_checkpoint_continues_its_run(name: str, world_of_one: Any, tmp_path: Path) -> None:
    prepare_corpus(
        tmp_path / "data", Packing(ByteTokenizer(), 16, "bos", "mds"), Corpus((str(FORMER / "corpus.jsonl"),)), workers=1, progress=False
    )
    shutil.copytree(FORMER / name, tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000003")
    recipe = recipes.load(FORMER / "recipe.yaml", [f"run.dir={tmp_path / 'run'}", f"data.path={tmp_path / 'data'}"])
    validate(recipe)
    train(recipe, world_of_one)
    expected = [line for line in lines(FORMER / "metrics.jsonl") if line["step"] > 3]
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in found] == [(line["kind"], line["step"]) for line in expected]
    for line, former in zip(found, expected, strict=True):
        for key in {"loss", "gradient_norm", "nelbo"} & set(former):
            assert line[key] == pytest.approx(former[key], rel=1e-5)
