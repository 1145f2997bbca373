"""`python -m bd3_scale.plan RECIPE [key=value ...] --world-size 64 --device h100`: does it fit, how long does it take, what does it cost.

No GPU, no process group. `--search` lists the best layouts for the same devices; `--rehearse` runs the recipe's stages, engine and
schedule on this machine as single ranks of the whole world (see `planning/rehearsal.py`). `--json` prints one JSON document.

Exit status: 0, also for a plan that does not fit (it says so); 2 for a recipe that cannot work on that many ranks, with the same line as
the run on the cluster; 1 for a tokenizer that cannot be read or a rehearsal that fails.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from typing import Any

from bd3_scale import recipe as recipes
from bd3_scale.errors import RecipeError, UserError
from bd3_scale.program import run_program


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bd3 plan", description="Plan a run: memory, time, price; no GPU needed.")
    parser.add_argument("recipe", help="a YAML file, for example recipes/owt_1b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, for example parallel.tensor=4")
    parser.add_argument("--world-size", type=int, default=1, help="ranks, one per device (default 1)")
    parser.add_argument("--device", default="h100", help="a100-40, a100-80, h100, h200, b200 or cpu (default h100)")
    parser.add_argument("--mfu", type=float, help="share of its peak that a device reaches while it computes (default: part by part)")
    parser.add_argument("--price", type=float, metavar="RATE", help="price of one device for an hour")
    parser.add_argument("--gpus-per-node", type=int, help="devices in a node (default: as the device's usual server has)")
    parser.add_argument("--network", type=float, metavar="GB/s", help="bandwidth of one device to other nodes, one way")
    parser.add_argument("--vocabulary", type=int, metavar="V", help="ids with MASK (default: those of the recipe's tokenizer)")
    parser.add_argument("--search", nargs="?", type=int, const=10, metavar="N", help="list the N best layouts (default 10)")
    parser.add_argument("--rehearse", action="store_true", help="run the recipe's stages, engine and schedule here, as ranks of the world")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_intermixed_args(arguments)
    try:
        answer, text = plan(options)
    except UserError as error:
        return error.say()
    print(json.dumps(answer, indent=1) if options.json else text)
    return 0


def plan(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(what `--json` prints, what people read). Raises UserError."""
    from bd3_scale.planning.cluster_plan import cluster_plan
    from bd3_scale.planning.devices import device_named
    from bd3_scale.planning.report import as_text, make_plan

    for name, value in (("--world-size", options.world_size), ("--mfu", options.mfu), ("--gpus-per-node", options.gpus_per_node)):
        if value is not None and value <= 0:
            raise RecipeError(f"{name} is {value} but must be above 0")
    recipe = recipes.load(options.recipe, options.overrides)
    network = None if options.network is None else options.network * 1e9
    device = device_named(options.device, options.world_size, options.gpus_per_node, network)
    cluster = cluster_plan(recipe, options.world_size, device, options.vocabulary)
    made = make_plan(cluster, options.mfu, options.price)
    answer, text = made.to_dict(), as_text(made)
    if options.search is not None:
        from bd3_scale.planning import search

        found = search.search(cluster, options.mfu, options.search)
        answer["search"] = [asdict(one) for one in found]
        text += "\n\n" + search.as_text(found, options.world_size, device.name)
    if options.rehearse:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron-core's, about parts that nothing here uses
            from bd3_scale.planning.rehearsal import rehearse

            lines = rehearse(cluster)
        answer["rehearsal"] = lines
        text += "\n\nrehearsed\n" + "\n".join(lines)
    return answer, text


if __name__ == "__main__":
    run_program(main)
