"""The command: a plan for people and for programs, and for what cannot work the line that the cluster would print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_scale import plan
from bd3_scale import recipe as recipes
from bd3_scale.errors import RecipeError
from bd3_scale.rules.validate import validate

RECIPE = str(Path(__file__).resolve().parents[2] / "recipes" / "owt_1b.yaml")


def test_it_prints_a_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([RECIPE, "--world-size", "64", "--device", "h100", "--price", "2.5", "--mfu", "0.45"]) == 0
    text = capsys.readouterr().out
    for word in ("parameters  1,3", "tensor 1 x pipeline 1 x data 64, ZeRO 3", "fits:", "days", "price", "MFU"):
        assert word in text


def test_json_is_one_document_with_the_layouts_that_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([RECIPE, "--world-size", "64", "--json", "--search", "3", "parallel.zero=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"]["zero"] == 2 and found["fits"] and len(found["search"]) == 3
    assert found["memory"][0]["total"] == sum(number for kind, number in found["memory"][0].items() if kind != "total")
    assert found["total_parameters"] == sum(found["parameters"].values())


@pytest.mark.parametrize(
    "wrong", [["parallel.tensor=3"], ["parallel.pipeline=4", "parallel.engine=deepspeed"], ["training.global_batch=30"]]
)
def test_a_wrong_layout_has_the_line_of_the_cluster(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError) as error:
        validate(recipes.load(RECIPE, wrong), 64, "cuda")
    assert plan.main([RECIPE, *wrong, "--world-size", "64", "--rehearse"]) == RecipeError.exit_code
    assert capsys.readouterr().err == f"bd3_scale: error: {error.value}\n"


def test_filler_is_said_and_its_time_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """A node is lost: 56 of 64 replicas share 512 rows, 10 or 9 each where it were 8; the step is that much longer."""
    found, text = {}, {}
    for world_size in (56, 64):
        assert plan.main([RECIPE, "--world-size", str(world_size), "--json", "parallel.micro_batch=1"]) == 0
        found[world_size] = json.loads(capsys.readouterr().out)
        assert plan.main([RECIPE, "--world-size", str(world_size), "parallel.micro_batch=1"]) == 0
        text[world_size] = capsys.readouterr().out
    assert "512 rows on 56 replicas: 10 or 9 each, 8.6 % of the computed rows are filler" in text[56]
    assert "filler" not in text[64] and (found[64]["filler"], found[56]["filler"]) == (0.0, pytest.approx(1 - 512 / 560))
    compute = [found[world_size]["phases"][0]["step"]["compute"] for world_size in (56, 64)]
    assert compute[0] / compute[1] == pytest.approx(10 / 8)
    assert found[56]["tokens_per_step"] == found[64]["tokens_per_step"]


def test_options_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert plan.main([RECIPE, "--world-size", "0"]) == 2
    assert plan.main([RECIPE, "--world-size", "64", "--device", "tpu"]) == 2
    assert plan.main([RECIPE, "--world-size", "64", f"data.tokenizer={tmp_path / 'none.json'}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "--world-size" in lines[0] and "a100-40" in lines[1] and "--vocabulary" in lines[2]
    assert plan.main([RECIPE, "--world-size", "64", f"data.tokenizer={tmp_path / 'none.json'}", "--vocabulary", "32001"]) == 0


def test_a_plan_imports_neither_megatron_nor_deepspeed() -> None:
    """They cost seconds, and a plan is to be there at once."""
    code = (
        "import sys; from bd3_scale import plan; "
        f"plan.main([{RECIPE!r}, '--world-size', '64', '--search', '1']); "
        "print([name for name in ('megatron', 'deepspeed', 'streaming', 'wandb', 'matplotlib') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.splitlines()[-1] == "[]"
