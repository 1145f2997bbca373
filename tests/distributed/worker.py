"""Runs many small trainings in one set of processes, because starting one costs more than a training.

`worker.py PLAN.json`: a list of [recipe file, list of overrides]; each is trained to its end in its own run.dir. Each
training joins and leaves a world of its own: the threads of hundreds of groups of earlier ones would slow the later ones.
"""

from __future__ import annotations

import gc
import json
import os
import sys

import torch.distributed as dist

from bd3_scale import recipe as recipes
from bd3_scale import train
from bd3_scale.costs import sizes
from bd3_scale.distributed import layout
from bd3_scale.model import compiling

sizes.SMALLEST_BUCKET = 1000  # so that networks this small are reduced and gathered in several
compiling.BACKEND = "aot_eager"  # the same graphs as Inductor's, without a C++ compiler's minute for each


def main() -> None:
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    rank, world_size = int(os.environ.get("RANK", "0")), recipes.world_size_of_environment()
    for number, (path, overrides) in enumerate(plan):
        recipe = recipes.load(path, overrides)
        recipes.validate(recipe, world_size, "cpu")
        # A world that is joined a second time needs another place to meet.
        store = dist.FileStore(f"{sys.argv[1]}.{number}.store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        here = layout.start(recipe.parallel, "cpu")
        train.train(recipe, here)
        here.barrier()
        layout.stop()
        gc.collect()


if __name__ == "__main__":
    main()
