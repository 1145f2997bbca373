"""Text is what was written, character for character; a number is what it looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_scale import recipe as recipes
from bd3_scale import train
from bd3_scale.errors import RecipeError
from bd3_scale.recipe.definition import FORMER_NAMES
from tests.unit.refusing import refused

TEXTS = ["0012", "12:30:00", "1e5", "on", "No", "0x1F", "1_000", "2026-11-27", ".5", "null", "~", "+7", "é", "a b  c", "-1", "yes", "1.10"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_what_was_written(text: str, base: Path, tmp_path: Path) -> None:
    keys = ["run.name", "data.path", "tracking.project"]
    path = tmp_path / "written.yaml"
    path.write_text(
        f"run: {{name: {text}}}\ndata:\n  path: {text}\n  mixture: [{{path: {text}, weight: 1}}]\ntracking:\n  project: {text}\n"
    )
    for recipe in (recipes.load(base, [f"{key}={text}" for key in keys]), recipes.load(path)):
        assert [recipes.flatten(recipe)[key] for key in keys] == [text] * 3 and recipe.run.dir == f"runs/{text}"
        (tmp_path / "again.yaml").write_text(recipes.to_yaml(recipe))
        assert recipes.load(tmp_path / "again.yaml") == recipe
    assert recipes.load(path).data.mixture[0].path == text
    assert recipes.load(base, [f"data.mixture=[{{path: {text}}}]", f"run.amend=[{text}]"]).data.mixture[0].path == text


def test_quotes_comments_and_references(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB", "0012")
    for written, text in {
        '"0012"': "0012",
        "'on'": "on",
        "a #b": "a #b",
        "a=b": "a=b",
        "${oc.env:JOB}": "0012",
        "x-${run.seed}": "x-0",
    }.items():
        assert recipes.load(base, [f"run.name={written}"]).run.name == text
    assert recipes.load(base, ["data.remote=null"]).data.remote is None and recipes.load(base, ["data.remote=~"]).data.remote is None
    changed = recipes.load(base, ["training.learning_rate=1e-4", "training.tokens=10_000", "tracking.progress=off", "run.seed=0"])
    assert (changed.training.learning_rate, changed.training.tokens, changed.tracking.progress) == (1e-4, 10_000, False)


def test_a_key_by_its_former_name_is_that_key(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "former.yaml"
    path.write_text("run: {amend: [training.schedule]}\ntraining: {schedule: wsd}\nobjective:\n  schedule: cosine\n")
    with caplog.at_level("INFO", "bd3_scale"):
        recipe = recipes.load(path)
    assert (recipe.training.learning_rate_schedule, recipe.objective.noise_schedule) == ("wsd", "cosine")
    assert recipe.run.amend == ["training.learning_rate_schedule"]
    assert {record.message for record in caplog.records} == {
        f"{former} is called {today} now, and read as that" for former, today in FORMER_NAMES.items()
    }
    for written in (["training.schedule=wsd", "objective.schedule=cosine"], ["training={schedule: wsd}", "objective={schedule: cosine}"]):
        assert recipes.load(base, [*written, "run.amend=[training.schedule]"]) == recipes.load(
            base, ["training.learning_rate_schedule=wsd", "objective.noise_schedule=cosine", f"run.amend=[{recipe.run.amend[0]}]"]
        )
    assert (
        recipes.load(base, ["training.schedule=wsd", "training.learning_rate_schedule=cosine"]).training.learning_rate_schedule == "cosine"
    )
    caplog.clear()
    recipes.load(path, saved=True)
    assert not caplog.records
    path.write_text("run: {name: 'x-${training.schedule}', amend: ['training.schedule']}\ntraining: {schedule: wsd}\n")
    for recipe in (recipes.load(path), recipes.load(path, ["run.name=x-${training.schedule}", "run.amend=['training.schedule']"])):
        assert (recipe.run.name, recipe.run.amend) == ("x-wsd", ["training.learning_rate_schedule"])
    path.write_text("training: {schedule: wsd, learning_rate_schedule: cosine}")
    with pytest.raises(RecipeError, match="training has learning_rate_schedule twice"):
        recipes.load(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("training: {warmup.steps: 7}", "Key 'warmup.steps' not in 'TrainingConfig'"),
        ("x.training: {steps: 7}", "Key 'x.training' not in 'Recipe'"),
        ("training.steps: 7", "Key 'training.steps' not in 'Recipe'"),
    ],
)
def test_a_key_with_dots_is_not_its_last_part(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "dots.yaml").write_text(text)
    with pytest.raises(RecipeError, match=named):
        recipes.load(tmp_path / "dots.yaml")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("run.seed=010", "run.seed is 010, but a number has no leading zeros; set run.seed=10"),
        ("run.seed=-0_7", "set run.seed=-7"),
        ("training.steps=12:30:00", "training.steps is 12:30:00, but a number has no colons"),
        ("objective.block_size={2:0.5,4:0.5}", "write the number itself, or of a mapping a space behind its colon"),
        ("training.global_batch=[[0,010]]", "training.global_batch is 010"),
        ("training.learning_rate=1:30.5", "training.learning_rate is 1:30.5"),
        ("run.name=@x", "override 'run.name=@x' is not YAML"),
        ("run.name=[a", "override 'run.name=[a' is not YAML"),
        ("run.name=[a]", "run.name"),
    ],
)
def test_a_number_is_no_other_than_it_looks(
    override: str, named: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(base, [override])
    assert train.main([str(base), override]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    if "@" not in override and "[a" not in override:
        section, _, key = override.partition("=")[0].partition(".")
        (tmp_path / "file.yaml").write_text(f"{section}: {{{key}: {override.partition('=')[2]}}}")
        assert named in refused(tmp_path / "file.yaml", [])


def test_validation_sets_are_text_by_plain_names(base: Path, tmp_path: Path) -> None:
    recipe = recipes.load(base, ["validation.sets={0012: 007, on: /b}"])
    assert recipe.validation.sets == {"0012": "007", "on": "/b"}
    (tmp_path / "again.yaml").write_text(recipes.to_yaml(recipe))
    assert recipes.load(tmp_path / "again.yaml") == recipe
    recipes.compare(recipes.load(base), recipe, 10)  # a continued run may measure more
    assert "validation.sets has the name 'a/b'" in refused(base, ["validation.sets={a/b: /c}"])
