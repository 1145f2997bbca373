"""The evaluation command: what it prints, for people and as JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bd3_scale.evaluate import main
from tests.unit.evaluation.conftest import save_data
from tests.unit.test_sample_command import save_run

pytestmark = pytest.mark.usefixtures("world_of_one")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data") / "rows")


def test_likelihood_for_people_and_as_json(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["likelihood", str(run), "--data", str(data), "--rows", "6", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["rows"], document["tokens"], document["exact"]) == (6, 90, False)
    assert (document["weights"], document["objective"], document["block_size"]) == ("ema", "bd3", 4)
    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"NELBO {document['nelbo']:.4f} +- {document['standard_error']:.4f}" in text
    assert f"perplexity <= {document['perplexity']:.3f}" in text


def test_a_zero_shot_set_is_prepared_and_evaluated(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "valid.txt").write_text("it 's a text of <unk> words\n" * 10)
    command = ["likelihood", str(run), "--zero-shot", "ptb", "--source", str(tmp_path / "valid.txt"), "--cache", str(tmp_path / "cache")]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    payload = 15  # of a row of 16 with its BOS
    assert document["data"] == "ptb" and document["rows"] == 10 * len("it's a text of ? words") // payload


def test_generation_writes_its_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = save_run(tmp_path / "judge", kind="ar", block_size=None)
    output = tmp_path / "texts"
    command = ["generation", str(run), "--samples", "3", "--length", "20", "--ignore-eos", "--top-p", "0.9", "--output", str(output)]
    assert main([*command, "--judge", str(judge), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((output / "summary.json").read_text())
    assert document["options"]["top_p"] == 0.9 and document["length_median"] == 19 and document["generative_perplexity"] > 1
    assert len((output / "samples.jsonl").read_text().splitlines()) == 3
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_model_without_likelihood_is_evaluated_by_its_texts(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run", model={"conditioning": "adaln"}, kind="ssdlm")
    assert main(["likelihood", str(run), "--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert "objective.kind=ssdlm, which has no likelihood" in error and error.count("\n") == 1
    command = [
        "generation",
        str(run),
        "--samples",
        "2",
        "--length",
        "12",
        "--steps",
        "2",
        "--ignore-eos",
        "--output",
        str(tmp_path / "texts"),
    ]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["options"]["sampler"] == "simplex" and document["nfe"] == 3 * 2 + 2 and document["length_median"] == 11


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["likelihood"], 2, "required: checkpoint"),
        (["likelihood", "RUN", "--data", "DATA", "--rows", "0"], 2, "rows is 0"),
        (["likelihood", "RUN", "--data", "DATA", "--tensor", "2"], 2, "--tensor 1"),
        (["likelihood", "RUN", "--data", "DATA", "--context", "2"], 2, "--context 1"),
        (["likelihood", "RUN", "--data", "nowhere"], 1, "nowhere: holds no manifest"),
        (["likelihood", "nowhere", "--data", "DATA"], 1, "nowhere"),
        (["likelihood", "RUN", "--zero-shot", "ptb"], 2, "give both"),
        (["likelihood", "RUN", "--zero-shot", "c4", "--source", "x"], 2, "'c4' is not known"),
        (["likelihoods", "RUN"], 2, "invalid choice"),
    ],
)
def test_what_cannot_work_is_one_line(
    arguments: list[str], status: int, reason: str, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RUN": str(run), "DATA": str(data)}
    assert main([names.get(word, word) for word in arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith("bd3_scale: error: ") and reason in error and error.count("\n") == 1
