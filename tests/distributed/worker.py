"""Runs many small trainings in one set of processes, because starting one costs more than a training.

`worker.py PLAN.json`: a list of [recipe file, list of overrides]; each is trained to its end in its own run.dir. Each
training joins and leaves a world of its own: the threads of hundreds of groups of earlier ones would slow the later ones.
"""

from __future__ import annotations

from bd3_scale import compiling, train
from bd3_scale import recipe as recipes
from bd3_scale.costs import sizes
from bd3_scale.distributed import layout
from bd3_scale.launcher import launched
from bd3_scale.rules.validate import validate
from tests.distributed.worlds import worlds

sizes.SMALLEST_BUCKET = 1000  # so that networks this small are reduced and gathered in several
compiling.BACKEND = "aot_eager"  # the same graphs as Inductor's, without a C++ compiler's minute for each


def main() -> None:
    for path, overrides in worlds():
        recipe = recipes.load(path, overrides)
        validate(recipe, launched().world_size, "cpu")
        here = layout.start(recipe.parallel, "cpu")
        train.train(recipe, here)
        here.barrier()


if __name__ == "__main__":
    main()
