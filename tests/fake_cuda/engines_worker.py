"""The engines themselves on the fake device, one after the other in a world of one: `engines_worker.py OUT` writes what each waited for.

In a process of its own, because DeepSpeed is of one device for as long as the process lives, and megatron-core is turned to the CPU by
other tests.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from bd3_scale.distributed import layout, megatron_on_cpu
from bd3_scale.distributed.layout import Layout
from bd3_scale.engines.build import build_engine
from bd3_scale.objectives.table import ObjectiveSchedule
from bd3_scale.optimizers.ema import ExponentialAverage
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.schema import ModelConfig, ObjectiveConfig, ParallelConfig
from bd3_scale.reporting.metrics import Meter
from bd3_scale.saving.background import HostCopy
from tests.fake_cuda.device import DEVICE, fake_cuda

ENGINES: dict[str, tuple[str, int, str] | tuple[str, int, str, str]] = {
    "megatron, zero 0, fp32": ("megatron", 0, "fp32"),
    "megatron, zero 1, fp32": ("megatron", 1, "fp32"),
    "megatron, zero 1, bf16": ("megatron", 1, "bf16"),
    "megatron, zero 1, bf16, muon": ("megatron", 1, "bf16", "muon"),
    "fsdp, zero 2, bf16": ("fsdp", 2, "bf16"),
    "fsdp, zero 3, bf16": ("fsdp", 3, "bf16"),
    "deepspeed, zero 0, fp32": ("deepspeed", 0, "fp32"),
    "deepspeed, zero 1, fp32": ("deepspeed", 1, "fp32"),
    "deepspeed, zero 1, bf16": ("deepspeed", 1, "bf16"),
    "deepspeed, zero 2, bf16": ("deepspeed", 2, "bf16"),
    "deepspeed, zero 3, bf16": ("deepspeed", 3, "bf16"),
}
L, WORDS, ROWS, MICRO_BATCHES, STEPS = 128, 130, 2, 2, 3


def recipe(engine: str, zero: int, precision: str, optimizer: str = "adamw") -> Recipe:
    plain = Recipe()
    return replace(
        plain,
        model=ModelConfig(context=L, layers=2, hidden=64, heads=4, dropout=0.1, conditioning="adaln"),
        objective=ObjectiveConfig(block_size=16),
        training=replace(
            plain.training, optimizer=optimizer, precision=precision, global_batch=ROWS * MICRO_BATCHES, spike_deviations=3.0, steps=STEPS
        ),
        parallel=ParallelConfig(zero=zero, engine=engine, micro_batch=ROWS),
    )


def train(here: Layout, *chosen: Any) -> dict[str, Any]:
    """Steps as the loop makes them, an evaluation with averaged weights, what a save takes, what a logging step reads."""
    settings = recipe(*chosen)
    objective = ObjectiveSchedule.of(settings, WORDS, device="cuda").at(0)
    rows = np.random.default_rng(0).integers(0, WORDS, (ROWS, L))
    inputs = [
        objective.training_inputs(rows, np.arange(first, first + ROWS), 0, 0, ROWS * MICRO_BATCHES)
        for first in range(0, ROWS * MICRO_BATCHES, ROWS)
    ]
    with fake_cuda(answer=0) as device:
        built = build_engine(settings, replace(here, device=DEVICE), WORDS + 1, WORDS)
        average = ExponentialAverage(built.masters, 0.999, built.publish, built.settle)
        meter = Meter(DEVICE, 0, None)
        steps = []
        for step in range(1, STEPS + 1):
            # In the first ones masks are made, and ZeRO 3 learns what is needed when.
            device.answer = 0 if step < STEPS else None
            device.forget()
            loss = built.forward_backward(inputs, ROWS * MICRO_BATCHES * (L - 1))
            norm = built.step(1e-3)
            average.update(step)
            meter.add(loss, norm)
            steps.append(list(device.places))
        with average.swapped():
            answers = built.evaluate(inputs)
        fragments = built.owned_fragments(average.tensors)
        HostCopy().take(fragments)
        evaluated = list(device.places)
        assert loss.device == norm.device == DEVICE and loss.dtype == norm.dtype == torch.float32
        assert all(nll is not None and nll.is_cuda and nll.dtype == torch.float32 for nll in answers)
        assert all(fragment.value.is_cuda and fragment.value.dtype == torch.float32 for fragment in fragments)
        device.answer = 0
        device.forget()
        meter.read(L, lambda value: value, 1.0)
        logged = len(device.places)
        built.close()
    return {"step": steps[-1], "evaluated": evaluated[len(steps[-1]) :], "logged": logged}


def main() -> None:
    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cuda"  # which a run sets at its start
    here = layout.start(ParallelConfig(), "cpu")
    for name in megatron_on_cpu.MODULES:  # as on CUDA, where nobody binds anything else
        importlib.import_module(f"megatron.core.{name}").torch = torch  # type: ignore[attr-defined]
    results = {}
    for name, chosen in ENGINES.items():
        try:
            with alone():
                results[name] = train(here, *chosen)
        except Exception:
            results[name] = {"error": traceback.format_exc()[-4000:]}
    layout.stop()
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)


def alone() -> Any:
    """ZeRO 3 compares with rank 0 what its ranks ask for in the first step, by numbers that the device would have to hold."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    return mock.patch.object(coordinator, "assert_ints_same_as_other_ranks", lambda numbers: None)


if __name__ == "__main__":
    main()
