"""Measure what this project saves: every comparison alternates its sides in one run, because machines are noisy.

    python tools/benchmark.py step --layers 12 --hidden 768 --heads 12 --context 1024 --block-size 16
    python tools/benchmark.py one-block --micro-batch 4
    python tools/benchmark.py draws --micro-batch 4
    python tools/benchmark.py features
    python tools/benchmark.py memory --contexts 1024 2048 3072 4096
    python tools/benchmark.py device --contexts 2048 4096 --recompute layer
    python tools/benchmark.py limits --hidden 2048 --heads 16 --micro-batch 8
    python tools/benchmark.py sampling runs/quickstart
    python tools/benchmark.py tuner runs/quickstart
    python tools/benchmark.py world --ranks 64 256 1024 4096
    python tools/benchmark.py context --context 16384 --ranks 1 4

`step`: the training step of block diffusion against (a) its naive form (dense 2L x 2L mask, every layer on both halves,
logits for all 2L positions) and (b) an autoregressive step of the same network (causal, L tokens): time, the peak of
memory above weights, gradients and optimizer, and where the time goes. `one-block`: a step at L' = L against `mdlm` and `ar`.
`draws`: a step on as many noisy rows, of which 1, 2 or 4 share a clean half.
`features`: the same step with each saving switched off alone. `memory`: its peak against L. `device`: the 1.3B network on a
GPU, with each backend of FlexAttention and each way to compile. `limits`: what the device reaches of them, as `plan` takes it (numbers of
planning/devices.py). `sampling`: decoding with the cache against without, same seed,
same tokens. `tuner`: a validation that tunes against one that does not; the one-pass variances against a direct pass per interval.
`world`: start-up, memory, descriptors and the index of a checkpoint of one rank of a large world, simulated (benchmark_world.py).
`context`: the peak of memory of a step on one long row, by one rank and by several that divide it (benchmark_context.py).
Each writes benchmarks/DATE-NAME.{json,md} with commit, machine, command and numbers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

import torch
from benchmark_context import benchmark_context
from benchmark_limits import benchmark_limits
from benchmark_measure import machine, write_report
from benchmark_network import (
    benchmark_device,
    benchmark_draws,
    benchmark_features,
    benchmark_memory,
    benchmark_one_block,
    benchmark_step,
)
from benchmark_runs import benchmark_sampling, benchmark_tuner
from benchmark_world import benchmark_world

from bd3_scale.program import run_program
from bd3_scale.recipe import KEYS

COMMANDS = {
    "step": benchmark_step,
    "one-block": benchmark_one_block,
    "draws": benchmark_draws,
    "features": benchmark_features,
    "memory": benchmark_memory,
    "device": benchmark_device,
    "limits": benchmark_limits,
    "sampling": benchmark_sampling,
    "tuner": benchmark_tuner,
    "world": benchmark_world,
    "context": benchmark_context,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--label", help="name of the report (default: that of the command)")
    commands = parser.add_subparsers(dest="name", required=True)
    for name, text in (
        ("step", "training step against its naive form and an autoregressive step"),
        ("one-block", "training step at L' = L against masked diffusion and an autoregressive step"),
        ("draws", "training step on as many noisy rows (--micro-batch), of which 1, 2 or 4 share a clean half"),
        ("features", "every saving switched off alone"),
        ("memory", "peak of a step as rows grow"),
        ("limits", "what the device reaches of its limits: products, memory, attention, the head's loss"),
        ("device", "MFU, attention against causal flash, parity with the CPU: made for a GPU, rehearsed anywhere"),
    ):
        network = commands.add_parser(name, help=text)
        shape = {"layers": 24, "hidden": 2048, "heads": 16} if name == "device" else {"layers": 12, "hidden": 768, "heads": 12}
        for key, value in {**shape, "block-size": 16, "micro-batch": 4 if name == "draws" else 1}.items():
            network.add_argument(f"--{key}", type=int, default=value)
        if name in ("memory", "device"):
            default = [2048, 4096] if name == "device" else [1024, 2048, 3072, 4096]
            network.add_argument("--contexts", type=int, nargs="+", default=default, help="(default %(default)s)")
        else:
            network.add_argument("--context", type=int, default=1024)
        if name == "device":
            recomputed, compiled = KEYS["training.recompute"].choices, KEYS["training.compile"].choices
            network.add_argument("--recompute", default="none", choices=recomputed, help="activation checkpointing")
            network.add_argument("--compile", choices=compiled, help="of the layers (default: blocks on CUDA, else none)")
            network.add_argument("--compared", nargs="+", choices=compiled, help="choices to time against each other (default: that one)")
    sampling = commands.add_parser("sampling", help="decoding with and without the cache")
    sampling.add_argument("checkpoint", type=Path)
    sampling.add_argument("--length", type=int, default=256)
    tuning = commands.add_parser("tuner", help="a validation that tunes against one that does not; one pass against 36")
    tuning.add_argument("checkpoint", type=Path)
    tuning.add_argument("--rows", type=int, default=512)
    tuning.add_argument("--micro-batch", type=int, default=16)
    world = commands.add_parser("world", help="what a rank of a large world keeps account of, simulated")
    world.add_argument("--recipe", type=Path, default=Path("recipes/owt_1b.yaml"))
    world.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096], help="(default %(default)s)")
    world.add_argument("--shards", type=int, default=20000, help="of the data set (default %(default)s)")
    context = commands.add_parser("context", help="a step on one long row, by one rank and by several that divide it")
    for key, value in {"context": 16384, "block-size": 16, "layers": 2, "hidden": 64, "heads": 4}.items():
        context.add_argument(f"--{key}", type=int, default=value, help="(default %(default)s)")
    context.add_argument("--recompute", default="none", choices=KEYS["training.recompute"].choices, help="activation checkpointing")
    context.add_argument("--exchange", default="gather", choices=KEYS["parallel.context_exchange"].choices, help="of keys and values")
    context.add_argument("--ranks", type=int, nargs="+", default=[1, 4], help="(default %(default)s)")
    options = parser.parse_args(arguments)
    result = COMMANDS[options.name](options)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report = {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "command": " ".join(["python tools/benchmark.py", *(arguments or sys.argv[1:])]),
        "machine": machine(),
        "options": {key: str(value) for key, value in vars(options).items()},
        "result": result,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "seconds"}, indent=1))
    print(f"written: {write_report(options.label or options.name, options.out, report)}")
    return 0


if __name__ == "__main__":
    run_program(main)
