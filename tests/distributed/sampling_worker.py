"""Samples and trains on the ranks of one launch; what each rank got is gathered and written by the first.

`sampling_worker.py PLAN.json`: {"samples": [[checkpoint, options of generate_tokens], ...], "command": [arguments of the command],
"training": [recipe file, overrides], "trained": options for the checkpoint of the training, "output": file}.
The first network to be loaded joins the world, as the command does it; the training makes other groups in the same world.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from bd3_scale import recipe as recipes
from bd3_scale import sample, train
from bd3_scale.distributed import layout
from bd3_scale.errors import RecipeError
from bd3_scale.generation.load_model import load_network
from bd3_scale.rules.validate import validate


def sampled(checkpoint: str, options: dict[str, Any]) -> dict[str, Any]:
    """What `generate_tokens` gives on this rank, and how much of the network it held."""
    loaded = load_network(checkpoint, device="cpu")
    result = sample.generate_tokens(loaded, **options)
    held = sum(parameter.numel() for parameter in loaded.network.parameters())
    cache = list(loaded.network.new_cache(1, 8).storage.shape)
    tokens = [row.tolist() for row in result.tokens]
    return {"tokens": tokens, "stops": result.stops, "nfe": result.nfe, "held": held, "cache": cache, "ranks": loaded.peers.world_size}


def disagreement(checkpoint: str) -> str:
    """The error of ranks that do not ask for the same."""
    try:
        sample.generate_tokens(load_network(checkpoint, device="cpu"), seed=dist.get_rank())
    except RecipeError as error:
        return str(error)
    return "none"


def trained(path: str, overrides: list[str]) -> str:
    """Train to the end; what this rank printed."""
    recipe = recipes.load(path, overrides)
    validate(recipe, dist.get_world_size(), "cpu")
    parallel_state.destroy_model_parallel()
    here = layout.start(recipe.parallel, "cpu")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.train(recipe, here)
    here.barrier()
    return printed.getvalue()


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    mine: dict[str, Any] = {"samples": [sampled(*each) for each in plan["samples"]]}
    mine["disagreement"] = disagreement(plan["samples"][0][0])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        mine["status"] = sample.main(plan["command"])
    mine["command"] = printed.getvalue()
    mine["training"] = trained(*plan["training"])
    parallel_state.destroy_model_parallel()
    mine["trained"] = sampled(recipes.load(*plan["training"]).run.dir, plan["trained"])
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() == 0:
        Path(plan["output"]).write_text(json.dumps(ranks))
    layout.stop()


if __name__ == "__main__":
    main()
