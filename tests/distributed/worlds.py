"""What workers share: the plan that they are given, and a world of its own for each of its items.

`WORKER.py PLAN.json [OUT]`, on every rank. A world that is joined a second time needs another place to meet: a file for each.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from bd3_scale.distributed import layout
from bd3_scale.launcher import launched


def plan() -> Any:
    """What the first argument says."""
    with open(sys.argv[1]) as file:
        return json.load(file)


def join(name: object, timeout: float | None = None) -> dist.FileStore:
    """Meet the ranks of this launch in a world called `name`. `timeout`: seconds that its collectives may take."""
    rank, world_size = int(os.environ.get("RANK", "0")), launched().world_size
    store = dist.FileStore(f"{sys.argv[1]}.{name}.store", world_size)
    limit = None if timeout is None else datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    return store


def leave() -> None:
    layout.stop()
    gc.collect()


def worlds(timeout: Callable[[Any], float | None] = lambda item: None) -> Iterator[Any]:
    """The items of the plan, each while this rank is in the item's world."""
    for number, item in enumerate(plan()):
        join(number, timeout(item))
        yield item
        leave()


def results_of_ranks(measure: Callable[..., Any], timeout: Callable[[Any], float | None] = lambda item: None) -> None:
    """Write {name: [what each rank measured]} to OUT, for a plan of [name, what `measure` is given]."""
    results: dict[str, list[Any]] = {}
    for name, *given in worlds(timeout):
        mine = measure(*given)
        results[name] = [None] * dist.get_world_size()
        dist.all_gather_object(results[name], mine)
    write(results)


def write(results: Any) -> None:
    """To OUT, by the first rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        with open(sys.argv[2], "w") as file:
            json.dump(results, file)
