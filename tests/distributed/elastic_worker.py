"""Like worker.py, for checkpoints: `elastic_worker.py PLAN.json`, a list of [recipe file, overrides, action].

Actions: `train` (to the end of the recipe's budget), `resave` (load the newest checkpoint and save it at once).
"""

from __future__ import annotations

import gc
import json
import os
import sys

import torch.distributed as dist

from bd3_scale import recipe as recipes
from bd3_scale import train
from bd3_scale.data.open import open_data
from bd3_scale.distributed import layout
from bd3_scale.training.build import build_parts
from bd3_scale.training.trainer import Trainer


def resave(recipe: recipes.Recipe, here: layout.Layout) -> None:
    with open_data(recipe.data, recipe.model.context, leader=here.leader, barrier=here.barrier, progress=False) as data:
        trainer = Trainer(build_parts(recipe, here, data))
        assert trainer.step > 0, "nothing was loaded"
        trainer.save()
        trainer.close()


def main() -> None:
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    rank, world_size = int(os.environ.get("RANK", "0")), recipes.world_size_of_environment()
    for number, (path, overrides, action) in enumerate(plan):
        recipe = recipes.load(path, overrides)
        recipes.validate(recipe, world_size, "cpu")
        store = dist.FileStore(f"{sys.argv[1]}.{number}.store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        here = layout.start(recipe.parallel, "cpu")
        {"train": train.train, "resave": resave}[action](recipe, here)
        here.barrier()
        layout.stop()
        gc.collect()


if __name__ == "__main__":
    main()
