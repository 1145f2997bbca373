"""Like worker.py, with every row that a rank trains on written down: `trace_worker.py PLAN.json TRACES`.

The plan is a list of [recipe file, overrides, name]; rank r appends the rows of that training to TRACES/name-r.jsonl, as
tools/chaos_trace.py does. A stop is the end of a smaller `training.steps`, which the next training of that directory raises.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bd3_scale import recipe as recipes
from bd3_scale import train
from bd3_scale.data import loader
from bd3_scale.distributed import layout
from bd3_scale.launcher import launched
from bd3_scale.rules.validate import validate
from tests.distributed.worlds import worlds


def main() -> None:
    original = loader.Loader.take
    for path, overrides, name in worlds():
        recipe = recipes.load(path, overrides)
        validate(recipe, launched().world_size, "cpu")
        here = layout.start(recipe.parallel, "cpu")
        with open(Path(sys.argv[2]) / f"{name}-{here.rank}.jsonl", "a") as trace:

            def take(self: loader.Loader, samples: int, trace=trace, here=here) -> tuple[list[loader.MicroBatch], Any]:
                batches, prepared = original(self, samples)
                rows = [row for batch in batches for row in batch.rows[: batch.real].tolist()]
                slots = [slot for batch in batches for slot in batch.slots[: batch.real].tolist()]
                place = [here.tensor, here.pipeline, here.data]
                trace.write(json.dumps({"samples": samples, "slots": slots, "rows": rows, "layout": place}) + "\n")
                return batches, prepared

            loader.Loader.take = take  # type: ignore[method-assign]
            train.train(recipe, here)
            here.barrier()


if __name__ == "__main__":
    main()
