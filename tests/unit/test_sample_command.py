"""Networks from checkpoints, and the command on top of them: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint import store
from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.checkpoint.region import Region
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.engines.initialise import initialise
from bd3_scale.errors import CheckpointError, RecipeError
from bd3_scale.generation.generate import generate_tokens
from bd3_scale.generation.load_model import _that_of_the_first, check_tensor_ranks, load_network
from bd3_scale.model.transformer import Transformer
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.schema import DataConfig, ModelConfig, ObjectiveConfig
from bd3_scale.sample import main
from bd3_scale.tuning.interval_tuner import TunerState

pytestmark = pytest.mark.usefixtures("world_of_one")

TOKENIZER = load_tokenizer("bytes")
EMA_SCALE = 0.5
"""The averaged weights of the tests are half the last ones, so that one can tell them apart."""


def save_run(
    folder: Path,
    step: int = 100,
    *,
    ema: bool = True,
    fingerprint: str = TOKENIZER.fingerprint,
    model: dict[str, Any] | None = None,
    **objective: Any,
) -> Path:
    """A run directory with one checkpoint of a tiny network over bytes, context 16."""
    recipe = Recipe(
        model=ModelConfig(context=16, layers=1, hidden=16, heads=2, initial_std=0.3, **(model or {})),
        objective=ObjectiveConfig(**{"block_size": 4, **objective}),
        data=DataConfig(path="unused", tokenizer="bytes"),
    )
    recipe = replace(recipe, training=replace(recipe.training, steps=1000))
    network = Transformer(recipe.model, TOKENIZER.model_vocabulary_size, TOKENIZER.mask_id)
    initialise(network, recipe.model, seed=0)
    weights = {name: value.detach().float().view(-1).clone() for name, value in network.named_parameters()}
    shapes = {name: Region.whole(value.shape) for name, value in network.named_parameters()}
    fragments = [Fragment("weight", name, shapes[name], value) for name, value in weights.items()]
    if ema:
        fragments += [Fragment("ema", name, shapes[name], EMA_SCALE * value) for name, value in weights.items()]
    tuned = TunerState(block_size=4, interval=(0.3, 0.8)).to_dict()
    run = {"tuner": tuned, "tokenizer": {"name": "bytes", "fingerprint": fingerprint}}
    store.save(folder / "checkpoints", step, fragments, samples_consumed=step, run=run, recipe=recipes.to_yaml(recipe))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


# -- load_network ------------------------------------------------------------------------------------------------------


def test_weights_are_the_averaged_ones_unless_asked_otherwise(run: Path, tmp_path: Path) -> None:
    averaged, last = load_network(run), load_network(run / "checkpoints" / "step_00000100", weights="weight", device="cpu")
    assert (averaged.weights, last.weights) == ("ema", "weight")
    for (name, ema), (_, weight) in zip(averaged.network.named_parameters(), last.network.named_parameters(), strict=True):
        torch.testing.assert_close(ema, EMA_SCALE * weight, msg=name)
        assert not ema.requires_grad
    assert not averaged.network.training
    without = save_run(tmp_path, ema=False)
    assert load_network(without).weights == "weight"
    with pytest.raises(CheckpointError, match="has no ema"):
        load_network(without, weights="ema")


def test_the_objective_is_that_of_the_last_update(run: Path, tmp_path: Path) -> None:
    """The tuned interval, and the block size before a change that takes effect with the next update."""
    loaded = load_network(run)
    assert getattr(loaded.objective, "interval") == (0.3, 0.8)  # noqa: B009 - not every objective has one
    stages = [[0, 16], [100, 4]]
    assert load_network(save_run(tmp_path / "at", 100, block_size=stages)).objective.block_size == 16
    assert load_network(save_run(tmp_path / "after", 101, block_size=stages)).objective.block_size == 4


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another tokenizer") as refused:
        load_network(save_run(tmp_path, fingerprint="0" * 64))
    assert "\n" not in str(refused.value)


def test_a_damaged_byte_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (file,) = (tmp_path / "run").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_network(tmp_path / "run")


class Peers:
    """The second of two ranks; the first answers with `first`, whatever is gathered."""

    rank, world_size = 1, 2

    def __init__(self, *first: Any) -> None:
        self.first = list(first)

    def all_gather(self, value: Any) -> list[Any]:
        return [self.first.pop(0), value]

    def barrier(self) -> None:
        return None


def test_peers_take_the_checkpoint_that_the_first_found(tmp_path: Path) -> None:
    """Also where a training moved `latest` between their looks; a folder of other content is not taken for it."""
    found, later = (Checkpoint(save_run(tmp_path, step) / "checkpoints" / f"step_{step:08d}") for step in (100, 200))
    contents = sorted((name, record.sha256) for name, record in found.index.files.items())
    assert _that_of_the_first(later, Peers(found.path, (None, contents))).step == 100
    with pytest.raises(CheckpointError, match="not the same on all ranks"):
        _that_of_the_first(later, Peers(found.path, (None, contents[1:])))


@pytest.mark.parametrize(
    ("model", "count", "says"),
    [
        ({"heads": 4}, 3, "model.heads = 4 because every tensor rank takes whole heads; start it with --nproc-per-node 2"),
        ({"heads": 12, "key_value_heads": 3}, 4, "--nproc-per-node 3"),
        ({"heads": 12, "mlp_hidden": 50}, 4, "--nproc-per-node 2"),
        ({"heads": 1}, 8, "--nproc-per-node 1"),
    ],
    ids=str,
)
def test_a_number_of_processes_that_cannot_divide_the_network_is_refused(model: dict[str, Any], count: int, says: str) -> None:
    recipe = Recipe(model=ModelConfig(hidden=48, **model), objective=ObjectiveConfig(block_size=4))
    recipe = replace(recipe, training=replace(recipe.training, steps=1000))
    with pytest.raises(RecipeError, match=f"^{count} processes cannot share this network: ") as refused:
        check_tensor_ranks(recipe, count)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    check_tensor_ranks(recipe, int(str(refused.value).split()[-1]))


# -- generate_tokens ---------------------------------------------------------------------------------------------------


def test_prompts_begin_their_texts_and_are_repeated_side_by_side(run: Path) -> None:
    loaded = load_network(run)
    result = generate_tokens(loaded, prompts=["ab", "cdefg"], batch=4, length=24, stop_at_end_of_text=False)
    assert [bytes(row[1:prompt].tolist()).decode() for row, prompt in zip(result.tokens, result.prompt_lengths, strict=True)] == [
        "ab", "ab", "cdefg", "cdefg",
    ]  # fmt: skip
    assert all(row[0] == TOKENIZER.end_of_text and len(row) == 24 and row.max() < TOKENIZER.mask_id for row in result.tokens)
    assert result.generated == 2 * 21 + 2 * 18
    assert not np.array_equal(result.tokens[0], result.tokens[1])
    later = generate_tokens(loaded, prompts=["cdefg"], batch=2, length=24, stop_at_end_of_text=False, first_row=2)
    assert all(np.array_equal(a, b) for a, b in zip(result.tokens[2:], later.tokens, strict=True))


def test_the_default_length_is_the_context_and_the_cache_changes_nothing(run: Path) -> None:
    loaded = load_network(run)
    cached, uncached = (generate_tokens(loaded, batch=2, seed=3, stop_at_end_of_text=False, use_cache=use) for use in (True, False))
    assert [len(row) for row in cached.tokens] == [16, 16]
    assert all(np.array_equal(a, b) for a, b in zip(cached.tokens, uncached.tokens, strict=True))
    assert uncached.nfe < cached.nfe


@pytest.mark.parametrize("kind", ["ar", "mdlm"])
def test_other_objectives_are_sampled_too(tmp_path: Path, kind: str) -> None:
    loaded = load_network(save_run(tmp_path, kind=kind, block_size=None))
    result = generate_tokens(loaded, prompts=["abc"], length=12, stop_at_end_of_text=False)
    assert len(result.tokens[0]) == 12 and result.nfe >= 8
    if kind == "ar":
        assert result.nfe == 8  # the prompt and the first new token are one call
        assert len(generate_tokens(loaded, length=40, stop_at_end_of_text=False).tokens[0]) == 40
        with pytest.raises(RecipeError, match="predicts the next token"):
            generate_tokens(loaded, sampler="ancestral")
    else:
        assert len(generate_tokens(loaded, length=40, stop_at_end_of_text=False).tokens[0]) == 40
        with pytest.raises(RecipeError, match="set that"):
            generate_tokens(loaded, sampler="analytic")


def test_a_network_that_is_told_the_noise_is_sampled_by_its_scores(tmp_path: Path) -> None:
    loaded = load_network(save_run(tmp_path, model={"conditioning": "adaln"}, kind="sedd", block_size=None))
    for sampler in ("first_hitting", "analytic", "euler"):
        result = generate_tokens(loaded, prompts=["abc"], length=40, sampler=sampler, stop_at_end_of_text=False)
        assert (
            len(result.tokens[0]) == 40 and bytes(result.tokens[0][1:4].tolist()) == b"abc" and result.tokens[0].max() < TOKENIZER.mask_id
        )


def test_a_model_of_the_simplex_is_sampled_by_its_own_sampler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path, model={"conditioning": "adaln"}, kind="ssdlm")
    result = generate_tokens(load_network(run), prompts=["abc"], length=40, stop_at_end_of_text=False, steps=3)
    assert len(result.tokens[0]) == 40 and bytes(result.tokens[0][1:4].tolist()) == b"abc" and result.tokens[0].max() < TOKENIZER.mask_id
    assert result.nfe == 9 * 3 + 9  # the first of ten blocks is known; the last one is not read
    assert main([str(run), "--length", "20", "--steps", "2", "--json", "--ignore-eos"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["sampler"] == "simplex"
    assert main([str(run), "--length", "20", "--sampler", "ancestral"]) == 2
    assert "set simplex" in capsys.readouterr().err


# -- The command -------------------------------------------------------------------------------------------------------


def test_people_see_texts_and_a_line_about_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--prompt", "Return the", "--length", "30", "--batch-size", "2", "--ignore-eos"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Return the") == 2
    assert printed.count("[30 tokens, 11 given; stop: length; NFE ") == 2


def test_json_is_one_document_and_the_output_one_line_a_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "texts.jsonl"
    arguments = [str(run), "--prompt", "a", "bc", "--length", "20", "--sampler", "ancestral", "--steps", "2", "--top-p", "0.9"]
    arguments += ["--nucleus", "strict", "--temperature", "0.7", "--seed", "5", "--weights", "weight", "--ignore-eos"]
    assert main([*arguments, "--json", "--output", str(output)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["step"] == 100 and document["weights"] == "weight" and document["options"]["seed"] == 5
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == document["texts"]
    loaded = load_network(run, weights="weight")
    expected = generate_tokens(
        loaded, prompts=["a", "bc"], length=20, sampler="ancestral", steps=2, top_p=0.9, nucleus="strict", temperature=0.7, seed=5,
        stop_at_end_of_text=False,
    )  # fmt: skip
    assert document["nfe"] == expected.nfe
    for text, tokens in zip(document["texts"], expected.tokens, strict=True):
        assert text["tokens"] == tokens.tolist() and text["stop"] == "length"
        assert text["text"] == TOKENIZER.decode(tokens[1:].tolist())


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--length", "0"], 2, "length is 0"),
        (["--length", "many"], 2, "--length"),
        (["--top-p", "0"], 2, "top_p"),
        (["--top-p", "1.5"], 2, "top_p"),
        (["--steps", "3"], 2, "steps"),
        (["--sampler", "gibbs"], 2, "gibbs"),
        (["--nucleus", "half"], 2, "nucleus"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--seed", "-1"], 2, "seed"),
        (["--batch-size", "0"], 2, "batch"),
        (["--batch-size", "3", "--prompt", "a", "b"], 2, "multiple"),
        (["--prompt", "long enough", "--length", "12"], 2, "prompt 1 has 11 tokens"),
        (["--weights", "best"], 2, "weights"),
        (["--device", "abacus"], 2, "device"),
        (["--output", "/no/such/folder/x.jsonl"], 2, "/no/such/folder"),
        (["--bogus"], 2, "--bogus"),
        (["another"], 2, "another"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_work_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str
) -> None:
    assert main([str(run), *arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bd3_scale: error: ") and captured.err.count("\n") == 1 and says in captured.err


def test_the_checkpoint_after_the_prompts_needs_two_dashes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--length", "12", "--ignore-eos", "--prompt", "a b"]
    assert main([*options, str(run)]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("bd3_scale: error: no checkpoint is named; name it first") and refused.count("\n") == 1
    assert main([*options, "--", str(run)]) == main([str(run), *options]) == 0
    after, before = capsys.readouterr().out.split("--- text 1 of 1")[1:]
    assert after.splitlines()[:-1] == before.splitlines()[:-1]


def test_processes_that_cannot_share_the_network_hear_it_once_before_they_meet(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main([str(run)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("bd3_scale: error: 3 processes cannot share this network: ") and first.endswith("--nproc-per-node 2")
    assert len(waited) == 1 and waited[0] > 1 and "[rank 1]" in second  # only where the launcher does not end it by then


def test_what_cannot_be_read_or_would_be_overwritten_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 1
    (tmp_path / "texts.jsonl").write_text("precious")
    assert main([str(run), "--output", str(tmp_path / "texts.jsonl")]) == 2
    assert (tmp_path / "texts.jsonl").read_text() == "precious"
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("bd3_scale: error: ") for line in errors)
