"""One training step on long rows, by one rank and by several that divide them (`parallel.context`): memory at its peak, visible pairs.

Each world is one of processes of its own on gloo, with one thread each. Peaks are counted at the allocator, above what was there before
the step (weights, gradients, optimizer); the loss of the step says that they computed the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any


def benchmark_context(options: argparse.Namespace) -> dict[str, Any]:
    """A world for each number of ranks, one after the other."""
    found: dict[str, Any] = {}
    for ranks in options.ranks:
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            shape = [str(value) for value in (options.context, options.block_size, options.layers, options.hidden, options.heads)]
            command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
            subprocess.run([*command, __file__, file.name, options.recompute, options.exchange, *shape], env=environment, check=True)
            found[f"{ranks} ranks"] = json.load(file)
    return found


def measure(context: int, block_size: int, layers: int, hidden: int, heads: int, recompute: str, exchange: str) -> dict[str, Any]:
    """On this rank."""
    import numpy as np
    import torch.distributed as dist
    from benchmark_measure import kept_and_peak_bytes

    from bd3_scale.distributed import layout
    from bd3_scale.distributed.context_share import ContextShare
    from bd3_scale.engines.build import build_engine
    from bd3_scale.launcher import launched
    from bd3_scale.objectives.table import ObjectiveSchedule
    from bd3_scale.recipe import Recipe

    default, vocabulary = Recipe(), 259
    recipe = replace(
        default,
        model=replace(default.model, context=context, layers=layers, hidden=hidden, heads=heads, key_value_heads=max(1, heads // 2)),
        objective=replace(default.objective, block_size=block_size),
        training=replace(default.training, steps=1, global_batch=1, recompute=recompute),
        parallel=replace(default.parallel, context=launched().world_size, context_exchange=exchange, zero=1),
    )
    here = layout.start(recipe.parallel, "cpu")
    engine = build_engine(recipe, here, vocabulary, vocabulary - 1)
    objective = ObjectiveSchedule.of(recipe, vocabulary - 1).at(0)
    share = ContextShare(here.context_rank, here.context, ring=exchange == "ring")

    rows = np.random.default_rng(0).integers(0, vocabulary - 1, (1, context))
    given = share.of(objective.training_inputs(rows, np.zeros(1, np.int64), 0, 0, 1))
    losses: list[Any] = []
    exchanged = dist.all_to_all_single

    def exchanged_and_let_go(*tensors: Any, **options: Any) -> None:
        exchanged(*tensors, **options)
        time.sleep(0.01)  # gloo's thread lets go of what was sent: it would be the last to hold it, and what it frees is not counted

    dist.all_to_all_single = exchanged_and_let_go
    kept, peak = kept_and_peak_bytes(lambda: losses.append(engine.forward_backward([given], objective.scored_tokens_per_row)))
    total = float(here.sum_of_replicas(losses[0]))
    ranks = here.all_gather((peak, given.pattern.visible_pairs, kept))
    engine.close()
    layout.stop()
    return {
        "peak bytes above the start, by rank": [one[0] for one in ranks],
        "bytes kept for the backward, by rank": [one[2] for one in ranks],
        "visible pairs, by rank": [one[1] for one in ranks],
        "loss": total,
        "leader": here.is_main_rank,
    }


if __name__ == "__main__":
    context, block_size, layers, hidden, heads = map(int, sys.argv[4:])
    measured = measure(context, block_size, layers, hidden, heads, *sys.argv[2:4])
    if measured.pop("leader"):
        Path(sys.argv[1]).write_text(json.dumps(measured))
