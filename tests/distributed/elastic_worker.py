"""Like worker.py, for checkpoints: `elastic_worker.py PLAN.json`, a list of [recipe file, overrides, action].

Actions: `train` (to the end of the recipe's budget), `resave` (load the newest checkpoint and save it at once).
"""

from __future__ import annotations

from bd3_scale import recipe as recipes
from bd3_scale import train
from bd3_scale.data.open import open_data
from bd3_scale.distributed import layout
from bd3_scale.launcher import launched
from bd3_scale.rules.validate import validate
from bd3_scale.training.build import build_parts
from bd3_scale.training.trainer import Trainer
from tests.distributed.worlds import worlds


def resave(recipe: recipes.Recipe, here: layout.Layout) -> None:
    with open_data(recipe.data, recipe.model.context, leader=here.is_main_rank, barrier=here.barrier, progress=False) as data:
        trainer = Trainer(build_parts(recipe, here, data))
        assert trainer.step > 0, "nothing was loaded"
        trainer.save()
        trainer.close()


def main() -> None:
    for path, overrides, action in worlds():
        recipe = recipes.load(path, overrides)
        validate(recipe, launched().world_size, "cpu")
        here = layout.start(recipe.parallel, "cpu")
        {"train": train.train, "resave": resave}[action](recipe, here)
        here.barrier()


if __name__ == "__main__":
    main()
