"""Many processes write the texts of one: from the command, as a function, and at the end of a run, whatever layout trained.

Their logits differ from those of one process by rounding (sums over ranks), which could change a token where two tokens of
a draw tie within it; in fp32 and with fixed seeds it changes none here. Ranks of one group must agree in any case.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint import store
from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.region import Region
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.generation.generate import generate_tokens
from bd3_scale.generation.load_model import load_network
from bd3_scale.model.transformer import Transformer
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.schema import DataConfig, ModelConfig, ObjectiveConfig
from bd3_scale.reporting.samples import kept
from bd3_scale.tuning.interval_tuner import TunerState
from tests.distributed.forked import run_ranks

BLOCKS = ObjectiveConfig(block_size=4)
SHAPE: dict[str, Any] = {"context": 16, "layers": 2, "hidden": 32, "heads": 4}
NETWORKS = {
    "grouped": (ModelConfig(**SHAPE, key_value_heads=2, mlp="swiglu", norm="rmsnorm"), BLOCKS),
    "adaptive": (ModelConfig(**SHAPE, conditioning="adaln", conditioning_size=16, tied_head=True, mlp_bias=True, head_bias=True), BLOCKS),
    "next_token": (ModelConfig(**SHAPE, key_value_heads=1, tied_head=False), ObjectiveConfig(kind="ar", block_size=None)),
}
"""Two key/value heads are divided among two ranks and shared by four; one is always shared. V = 258 is padded for four."""
PROMPTS: dict[str, Any] = {"prompts": ["ab", "cdefg"], "batch": 4, "length": 22, "seed": 3, "stop_at_end_of_text": False}
"""Longer than the context: the cache slides."""
SAMPLERS: list[dict[str, Any]] = [
    PROMPTS,
    {**PROMPTS, "use_cache": False},
    {**PROMPTS, "sampler": "ancestral", "steps": 2, "top_p": 0.9, "nucleus": "strict", "temperature": 0.7},
    {**PROMPTS, "sampler": "confidence", "threshold": 0.2},
    {**PROMPTS, "sampler": "confidence", "temperature": 0.0, "use_cache": False},
]
SAMPLES = [
    *(("grouped", options) for options in SAMPLERS),
    *(("adaptive", SAMPLERS[index]) for index in (1, 2)),
    ("next_token", PROMPTS),
]
TRAININGS = {2: ["parallel.tensor=2", "parallel.sequence=true", "parallel.zero=3"], 4: ["parallel.tensor=2", "parallel.pipeline=2"]}
TRAINED: dict[str, Any] = {"batch": 1, "length": 20, "seed": 7}
"""What a run with sample_tokens = 20 and seed 7 prints in the end."""


def save(folder: Path, model: ModelConfig, objective: ObjectiveConfig) -> Path:
    """A run directory with a checkpoint of random weights, large enough that every part of the network matters."""
    tokenizer = load_tokenizer("bytes")
    recipe = Recipe(model=model, objective=objective, data=DataConfig(path="unused", tokenizer="bytes"))
    recipe = replace(recipe, training=replace(recipe.training, steps=10))
    network = Transformer(model, tokenizer.model_vocabulary_size, tokenizer.mask_id)
    numbers = torch.Generator().manual_seed(5)
    fragments = [
        Fragment("weight", name, Region.whole(value.shape), 0.3 * torch.randn(value.numel(), generator=numbers) + float("norm" in name))
        for name, value in network.named_parameters()
    ]
    run = {"tuner": TunerState(block_size=4, interval=(0.3, 0.8)).to_dict(), "tokenizer": {"fingerprint": tokenizer.fingerprint}}
    store.save(folder / "checkpoints", 10, fragments, samples_consumed=10, run=run, recipe=recipes.to_yaml(recipe))
    return folder


@pytest.fixture(scope="module")
def networks(world_of_one: object, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name), *configs) for name, configs in NETWORKS.items()}


@pytest.fixture(scope="module")
def of_one(networks: dict[str, Path]) -> list[dict[str, Any]]:
    """The samples by one process."""
    return [alone(networks[name], options) for name, options in SAMPLES]


def alone(checkpoint: Path, options: dict[str, Any]) -> dict[str, Any]:
    loaded = load_network(checkpoint, device="cpu")
    result = generate_tokens(loaded, **options)
    tokens = [row.tolist() for row in result.tokens]
    held = sum(parameter.numel() for parameter in loaded.network.parameters())
    return {"tokens": tokens, "stops": result.stops, "nfe": result.nfe, "held": held}


@pytest.mark.parametrize("ranks", [2, 4])
def test_many_processes_write_what_one_writes(
    ranks: int, networks: dict[str, Path], of_one: list[dict[str, Any]], recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    small = ["training.steps=1", "validation.every=0", "checkpoint.every=0", "tracking.sample_tokens=20", "tracking.progress=false"]
    output = tmp_path / "texts.jsonl"
    plan = {
        "samples": [(str(networks[name]), options) for name, options in SAMPLES],
        "command": [str(networks["grouped"]), "--prompt", "ab", "--length", "12", "--seed", "3", "--json", "--output", str(output)],
        "training": (str(recipe), [f"run.dir={run}", *small, *TRAININGS[ranks]]),
        "trained": TRAINED,
        "output": str(tmp_path / "results.json"),
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    finished = run_ranks(ranks, ["tests/distributed/sampling_worker.py", str(tmp_path / "plan.json")], tmp_path / "log", timeout=300)
    assert finished.status == 0, finished.output[-6000:]
    first, *others = results = json.loads((tmp_path / "results.json").read_text())

    # The function: every rank has the texts of one process, from its part of the weights and of the cache.
    for index, (name, options) in enumerate(SAMPLES):
        expected = of_one[index]
        for result in (rank["samples"][index] for rank in results):
            assert {key: result[key] for key in ("tokens", "stops", "nfe")} == {key: expected[key] for key in ("tokens", "stops", "nfe")}, (
                name,
                options,
            )
            assert result["ranks"] == ranks and result["held"] < 0.8 * expected["held"]
            assert result["cache"][4] == max(1, NETWORKS[name][0].kv_heads // ranks)
    assert len({json.dumps(result["tokens"]) for result in of_one}) == len(SAMPLES) - 1  # with and without the cache the same
    assert all("different texts" in rank["disagreement"] for rank in results)

    # The command: the first rank alone speaks and writes.
    document, written = json.loads(first["command"]), [json.loads(line) for line in output.read_text().splitlines()]
    ordered = alone(networks["grouped"], {"prompts": ["ab"], "length": 12, "seed": 3})
    assert document["processes"] == ranks and document["texts"] == written
    assert [text["tokens"] for text in written] == ordered["tokens"]
    assert all(rank["status"] == 0 for rank in results) and not any(rank["command"] for rank in others)

    # A training: the leader prints the sample of the whole network, and any number of processes samples the checkpoint.
    expected = alone(run, TRAINED)
    text = load_tokenizer("bytes").decode(expected["tokens"][0][1:])
    assert first["training"].endswith(f"a sample of 20 tokens:\n{text}\n")
    assert not any(rank["training"] for rank in others)
    step, samples = kept(run / "report")
    assert step == 1 and len({one.text for one in samples}) == 3 and samples[0].text == text
    assert all(rank["trained"]["tokens"] == expected["tokens"] and rank["trained"]["ranks"] == ranks for rank in results)
