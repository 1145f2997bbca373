"""A checkpoint as a universal checkpoint of DeepSpeed: a run goes on in another training program, on any number of ranks and ZeRO 1 or 2.

    OUT/latest_universal                               names the folder below
    OUT/global_stepN_universal/mp_rank_00_model_states.pt      the weights as a state_dict
    OUT/global_stepN_universal/zero/optimizer_state.pt         hyper-parameters of the two groups, matrices and the rest
    OUT/global_stepN_universal/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt

The trained weights are written, not the averaged ones, which DeepSpeed has no place for. Invariants: one tensor in memory at a time
(the state_dict apart, which torch.save takes as a whole, without copies of it); the bits are those of the checkpoint. What is written are
torch files, as DeepSpeed wants; nothing here reads one.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.errors import CheckpointError
from bd3_scale.generation.load_model import read_recipe
from bd3_scale.recipe.optimizers import ADAM
from bd3_scale.recipe.schema import TrainingConfig

DIVIDED_BY_COLUMNS = ("attention.output.weight", "mlp.down.weight")
"""Weights that tensor parallelism divides along dimension 1; all others along 0."""


def write_universal(checkpoint: Checkpoint, out: Path) -> None:
    """Write the folder `out`, which must not exist. Raises CheckpointError for a checkpoint without AdamW's moments, OSError."""
    recipe, tag = read_recipe(checkpoint), f"global_step{checkpoint.step}_universal"
    if recipe.training.states.whole_matrices:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is of training.optimizer={recipe.training.optimizer}, whose states DeepSpeed's AdamW cannot go "
            "on from; export it to a .safetensors file"
        )
    missing = {"weight", *ADAM} - set(checkpoint.kinds)
    if missing:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} has no {', '.join(sorted(missing))}, and a universal checkpoint is one to go on from; export "
            "it to a .safetensors file"
        )
    folder = out / tag
    weights = {}
    for name in sorted(checkpoint.shapes("weight")):
        parameter = folder / "zero" / name
        parameter.mkdir(parents=True)
        dimension = 1 if name.endswith(DIVIDED_BY_COLUMNS) else 0
        for kind, file in {"weight": "fp32", **{moment: moment for moment in ADAM}}.items():
            value = checkpoint.read(kind, name)
            torch.save({"param": value, "cat_dim": dimension}, parameter / f"{file}.pt")
            if kind == "weight":
                weights[name] = value
        torch.save(float(checkpoint.step), parameter / "step.pt")
    version = metadata.version("deepspeed")
    torch.save(
        {"param_groups": _groups(recipe.training), "ds_version": version, "clip_grad": recipe.training.clip},
        folder / "zero" / "optimizer_state.pt",
    )
    states: dict[str, Any] = {"module": weights, "ds_version": version, "global_steps": checkpoint.step, "dp_world_size": 1}
    states |= {"mp_world_size": 1, "global_samples": checkpoint.samples_consumed, "skipped_steps": 0, "universal_checkpoint_info": {}}
    torch.save(states, folder / "mp_rank_00_model_states.pt")
    (out / "latest_universal").write_text(tag)


def _groups(training: TrainingConfig) -> list[dict[str, Any]]:
    """Of AdamW: matrices, which decay, and the rest. The learning rate is the recipe's highest: its schedule stays behind."""
    common = {"lr": training.learning_rate, "betas": tuple(training.betas), "eps": training.epsilon}
    return [{**common, "weight_decay": training.weight_decay}, {**common, "weight_decay": 0.0}]
