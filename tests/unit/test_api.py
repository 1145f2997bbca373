"""The public names: few, lazy, and the same as what the commands use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bd3_scale
from bd3_scale.errors import RecipeError
from bd3_scale.generation.generate import generate_tokens
from tests.unit.test_sample_command import save_run

EXAMPLE = Path(__file__).parents[2] / "examples" / "python_api.py"


def test_names_are_listed_and_lazy() -> None:
    """A name more or less is a change that users see: CHANGELOG."""
    assert bd3_scale.__all__ == ["Kind", "generate", "load_model", "load_recipe", "register_objective", "score", "train_recipe"]
    code = "import sys, bd3_scale; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(bd3_scale, name).__doc__ for name in bd3_scale.__all__)
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        bd3_scale.scores  # noqa: B018


@pytest.mark.usefixtures("world_of_one")
def test_texts_are_those_of_the_command_and_scores_follow_the_chain_rule(tmp_path: Path) -> None:
    model = bd3_scale.load_model(save_run(tmp_path, block_size=1, interval=[1.0, 1.0]), device="cpu")
    (text,) = bd3_scale.generate(model, ["ab"], length=12, seed=3)
    tokens = generate_tokens(model, prompts=["ab"], length=12, seed=3).tokens[0]
    assert text == model.tokenizer.decode(tokens[1:].tolist()) and text.startswith("ab")
    both = bd3_scale.score(model, ["a", "ab"])
    assert both == bd3_scale.score(model, ["a"]) + bd3_scale.score(model, ["ab"], draws=3, seed=9)  # exact: no noise
    assert both[1] < both[0] < 0
    with pytest.raises(RecipeError, match="1 to 15 can be scored at once"):
        bd3_scale.score(model, ["a" * 16])


def test_a_recipe_is_checked_when_it_is_loaded(base: Path) -> None:
    assert bd3_scale.load_recipe(base, "training.steps=7").training.steps == 7
    with pytest.raises(RecipeError, match=r"model\.heads"):
        bd3_scale.load_recipe(base, "model.heads=7")


@pytest.mark.usefixtures("world_of_one")
def test_the_example_loads_scores_and_samples(tmp_path: Path) -> None:
    save_run(tmp_path)
    done = subprocess.run([sys.executable, EXAMPLE, tmp_path], check=True, capture_output=True, text=True)
    assert "nats per token" in done.stdout
