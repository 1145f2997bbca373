"""Measures what a start takes of memory: `start_worker.py PLAN.json OUT`, a list of [name, recipe, overrides].

Peak: the most resident memory from before the network is made until every rank has its initial weights, less what was resident before;
the C library gives back at once what is freed, so that it is what was held.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from bd3_scale import config
from bd3_scale.diffusion.objectives import objective_at
from bd3_scale.parallel import layout
from bd3_scale.parallel.build import build_engine
from bd3_scale.parallel.memory import stage_parameters, state_bytes
from bd3_scale.planning.devices import device_named
from bd3_scale.planning.situation import Situation

VOCABULARY = 2003


def resident(kind: str) -> int:
    """Bytes: VmRSS, or VmHWM, the most of it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return 1024 * int(line.split()[1])


def gradients_are_kept(recipe: config.Recipe, bf16: bool) -> bool:
    """Whether the engine has room for them from the start on."""
    parallel = recipe.parallel
    return parallel.resolved_engine == "megatron" or parallel.zero == 3 or (parallel.zero == 1 and bf16)


def measure(path: str, overrides: list[str]) -> dict[str, int]:
    recipe = config.load(path, overrides)
    world_size = config.world_size_of_environment()
    config.validate(recipe, world_size, "cpu")
    here = layout.start(recipe.parallel, "cpu")
    case = Situation(recipe, world_size, device_named("cpu", world_size), VOCABULARY)
    pattern = objective_at(recipe.objective, recipe.model.context, VOCABULARY - 1, 0).pattern
    here.barrier()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most of it from here on
    before = resident("VmRSS")
    engine = build_engine(recipe, here, VOCABULARY, VOCABULARY - 1, pattern, 0.5)
    peak = resident("VmHWM") - before
    stages = case.stages_of(here.pipeline_rank)
    state = state_bytes(recipe, stages, VOCABULARY, here.data, "cpu", case.precision == "bf16")
    sizes = [sum(stage_parameters(recipe.model, VOCABULARY, layers, here.tensor)) for layers in stages]
    engine.close()
    held = state.parameters + state.masters + (state.gradients if gradients_are_kept(recipe, case.precision == "bf16") else 0)
    return {"peak": peak, "held": held, "layer": 4 * sum(sizes) // recipe.model.layers, "parameters": sum(sizes)}


def main() -> None:
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    rank, world_size = int(os.environ.get("RANK", "0")), config.world_size_of_environment()
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    results = {}
    for number, (name, path, overrides) in enumerate(plan):
        store = dist.FileStore(f"{sys.argv[1]}.{number}.store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        mine = measure(path, overrides)
        every: list = [None] * world_size
        dist.all_gather_object(every, mine)
        results[name] = every
        if rank == 0:
            print(name, every, flush=True)
        layout.stop()
        gc.collect()
    if rank == 0:
        with open(sys.argv[2], "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
