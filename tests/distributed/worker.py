"""Runs many small trainings in one process group, because starting one costs more than a training.

`worker.py PLAN.json`: a list of [recipe file, list of overrides]; each is trained to its end in its own run.dir.
"""

from __future__ import annotations

import json
import sys

from megatron.core import parallel_state

from bd3_scale import config, train
from bd3_scale.parallel import layout


def main() -> None:
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    for path, overrides in plan:
        recipe = config.load(path, overrides)
        config.validate(recipe, config.world_size_of_environment(), "cpu")
        here = layout.start(recipe.parallel, "cpu")
        train.train(recipe, here)
        here.barrier()
        parallel_state.destroy_model_parallel()
    layout.stop()


if __name__ == "__main__":
    main()
