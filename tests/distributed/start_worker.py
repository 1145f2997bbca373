"""Measures what a rank holds at most while its engine is made: `start_worker.py PLAN.json OUT`, a list of [name, recipe, overrides]."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from pathlib import Path

import torch.distributed as dist

from bd3_scale import config
from bd3_scale.diffusion.objectives import objective_at
from bd3_scale.parallel import layout
from bd3_scale.parallel.build import build_engine

VOCABULARY = 12288


def resident(kind: str) -> int:
    """Bytes: `VmRSS` now, `VmHWM` at most so far."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measure(path: str, overrides: list[str]) -> dict[str, int]:
    recipe = config.load(path, overrides)
    config.validate(recipe, config.world_size_of_environment(), "cpu")
    here = layout.start(recipe.parallel, "cpu")
    objective = objective_at(recipe.objective, recipe.model.context, VOCABULARY - 1, 0)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is now
    before = resident("VmRSS")
    engine = build_engine(recipe, here, VOCABULARY, VOCABULARY - 1, objective.pattern, 0.5)
    most = resident("VmHWM") - before
    held = sum(master.untyped_storage().nbytes() for master in engine.masters)
    layer = 4 * (12 * recipe.model.hidden**2)
    elements = sum(place.numel for place in engine.places if place.owned)
    engine.close()
    return {"most": most, "held": held, "layer": layer, "elements": elements}


def main() -> None:
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    rank, world_size = int(os.environ["RANK"]), config.world_size_of_environment()
    results = {}
    for number, (name, path, overrides) in enumerate(plan):
        store = dist.FileStore(f"{sys.argv[1]}.{number}.store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        every: list = [None] * world_size
        dist.all_gather_object(every, measure(path, overrides))
        results[name] = every
        layout.stop()
        gc.collect()
    if rank == 0:
        with open(sys.argv[2], "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
