"""Measure what a checkpoint costs the training: python tools/benchmark_save.py --layers 6 --hidden 384 --vocabulary 50258

One run alternates three kinds of stretches: no save, a blocking save, an asynchronous save, each followed by the same number of steps.
The *stall* of a save is the time that the call holds the training up. The *cost* adds what the steps of its stretch took longer than
those of the stretch without one (the writing thread shares processor and memory with them). Both in median steps without a save.
Writes benchmarks/DATE-save.{json,md}. The state is that of AdamW: weights and two moments in fp32.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import machine, write_report

from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.region import Region
from bd3_scale.distributed import layout
from bd3_scale.engines.initialise import initialise
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import BlockDiffusion
from bd3_scale.program import run_program
from bd3_scale.recipe.schema import CheckpointConfig, ModelConfig, ParallelConfig
from bd3_scale.saving.background import Saver

KINDS = ("none", "blocking", "asynchronous")


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    layout.start(ParallelConfig(), options.device)
    config = ModelConfig(context=options.context, layers=options.layers, hidden=options.hidden, heads=options.hidden // 64)
    model = Transformer(config, options.vocabulary, options.vocabulary - 1)
    initialise(model, config, seed=0)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = np.random.default_rng(0).integers(0, options.vocabulary - 1, (options.micro_batch, options.context))
    objective = BlockDiffusion(options.vocabulary - 1, options.context, 16)
    inputs = objective.training_inputs(rows, np.arange(len(rows)), 0, 0, len(rows)).to(device)

    def step() -> float:
        start = time.perf_counter()
        (model(inputs)[0] / rows.size).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def fragments() -> list[Fragment]:
        found = []
        for name, parameter in model.named_parameters():
            tensors = {"weight": parameter, **{kind: optimizer.state[parameter][kind] for kind in ("exp_avg", "exp_avg_sq")}}
            found += [Fragment(kind, name, Region.whole(parameter.shape), t.detach().reshape(-1)) for kind, t in tensors.items()]
        return found

    savers = {kind: Saver(options.folder / kind, CheckpointConfig(keep=1, asynchronous=kind == "asynchronous")) for kind in KINDS[1:]}
    steps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    stalls: dict[str, list[float]] = {kind: [] for kind in KINDS[1:]}
    written: list[float] = []
    number = 0
    for turn in range(options.rounds + 1):
        for kind in KINDS:
            own = [step()]
            number += 1
            began = time.perf_counter()
            if kind != "none":
                stall = savers[kind].save(number, fragments(), samples_consumed=number, run={}, recipe="benchmark")
                if turn:
                    stalls[kind].append(stall)
            own += [step() for _ in range(options.steps)]
            if kind == "asynchronous":
                savers[kind].wait()
                if turn:
                    written.append(time.perf_counter() - began)
            if turn:  # the first turn warms up, and touches the host memory that later saves use again
                steps[kind] += own[1:]
        print(f"round {turn}/{options.rounds}" + (" (warm-up)" if turn == 0 else ""), file=sys.stderr, flush=True)
    for saver in savers.values():
        saver.close()
    median = statistics.median(steps["none"])
    in_steps = {kind: statistics.median(values) / median for kind, values in stalls.items()}
    longer = {kind: sum(values) / options.rounds / median - sum(steps["none"]) / options.rounds / median for kind, values in steps.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes_of_a_checkpoint": sum(4 * fragment.region.numel for fragment in fragments()),
        "median_step_seconds": median,
        "median_stall_seconds": {kind: statistics.median(values) for kind, values in stalls.items()},
        "stall_in_steps": in_steps,
        "largest_asynchronous_stall_in_steps": max(stalls["asynchronous"]) / median,
        "cost_in_steps": {kind: in_steps[kind] + longer[kind] for kind in KINDS[1:]},
        "blocking_over_asynchronous_stall": in_steps["blocking"] / in_steps["asynchronous"],
        "median_seconds_until_published_with_the_steps_meanwhile": statistics.median(written),
        "seconds": {"steps": steps, "stalls": stalls},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_save"), help="where checkpoints go; must not exist; deleted")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"layers": 6, "hidden": 384, "context": 128, "vocabulary": 50258, "micro-batch": 2, "steps": 3, "rounds": 5}
    for key, value in sizes.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True)
    try:
        result = benchmark(options)
    finally:
        shutil.rmtree(options.folder)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report = {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "command": " ".join(["python tools/benchmark_save.py", *(arguments or sys.argv[1:])]),
        "machine": machine(),
        "options": {key: str(value) for key, value in vars(options).items()},
        "result": result,
    }
    for key, value in result.items():
        if key != "seconds":
            print(f"{key}: {value}")
    print(f"written: {write_report('save', options.out, report)}")
    return 0


if __name__ == "__main__":
    run_program(main)
