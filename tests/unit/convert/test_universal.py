"""A universal checkpoint is what DeepSpeed's own engine loads: weights and moments bit for bit, in ZeRO 1 and 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint import store
from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.checkpoint.region import Region
from bd3_scale.costs.parameter_shapes import parameter_shapes
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.engines.zero_engine import _import_deepspeed
from bd3_scale.model.transformer import Transformer
from bd3_scale.tuning.interval_tuner import TunerState
from tools import convert_checkpoint

pytestmark = pytest.mark.usefixtures("world_of_one")

MASK = 257
SMALL = ["model.context=16", "model.layers=2", "model.hidden=32", "model.heads=4", "data.tokenizer=bytes", "training.steps=5",
         "training.weight_decay=0.1", "model.mlp_bias=true"]  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    asked = tmp_path / "asked.yaml"
    asked.write_text("{}")
    recipe, generator = recipes.load(asked, SMALL), torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in parameter_shapes(recipe.model, MASK + 1).items()}
    fragments = [
        Fragment(kind, name, Region.whole(shape), torch.rand(shape, generator=generator).reshape(-1))
        for kind in ("weight", "exp_avg", "exp_avg_sq", "ema")
        for name, shape in shapes.items()
    ]
    tokenizer = {"name": "bytes", "fingerprint": load_tokenizer("bytes").fingerprint}
    run = {"tuner": TunerState(8, (0.3, 0.8)).to_dict(), "tokenizer": tokenizer, "data": {"fingerprint": "0"}}
    text = recipes.to_yaml(recipe)
    return Checkpoint(store.save(tmp_path / "run" / "checkpoints", 5, fragments, samples_consumed=10, run=run, recipe=text))


def export(checkpoint: Checkpoint, out: Path) -> int:
    return convert_checkpoint.main(["export", str(checkpoint.path), str(out), "--deepspeed"])


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_loads_every_bit(stage: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path / "universal") == 0
    recipe = recipes.load(tmp_path / "asked.yaml", SMALL)
    model = Transformer(recipe.model, MASK + 1, MASK)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": True},
    }
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}])
    engine, *_ = _import_deepspeed("cpu").initialize(model=model, optimizer=optimizer, config=config)
    path, _ = engine.load_checkpoint(str(tmp_path / "universal"))
    assert path is not None
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping
        found = {"weight": mapping.get_hp_fragment(), **{moment: mapping.get_hp_fragment(moment) for moment in ("exp_avg", "exp_avg_sq")}}
        for kind, value in found.items():
            assert torch.equal(value.reshape(-1), checkpoint.read(kind, name).reshape(-1)), (kind, name)
        assert torch.equal(parameter, checkpoint.read("weight", name)), name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    engine.destroy()


def test_weights_alone_are_no_run_to_go_on_from(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_checkpoint.main(["export", str(checkpoint.path), str(tmp_path / "one.safetensors")]) == 0
    assert convert_checkpoint.main(["import", str(tmp_path / "one.safetensors"), str(tmp_path / "imported")]) == 0
    assert convert_checkpoint.main(["export", str(tmp_path / "imported"), str(tmp_path / "universal"), "--deepspeed"]) == 1
    assert "has no exp_avg, exp_avg_sq" in capsys.readouterr().err and not (tmp_path / "universal").exists()
