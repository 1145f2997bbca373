"""Starts one training after another as `bd3_scale.train` does, rank 1 with overrides of its own: `agreement_worker.py PLAN.json OUT.json`.

The plan is a list of [name, recipe, overrides, further overrides of rank 1]; `version=X` there is another version of torch.
"""

from __future__ import annotations

import datetime
import os

import torch.distributed as dist

from bd3_scale import recipe as recipes
from bd3_scale import train
from bd3_scale.distributed import layout
from bd3_scale.errors import UserError
from bd3_scale.fault_tolerance import agreement
from bd3_scale.launcher import launched
from tests.distributed.worlds import join, leave, plan, write


def main() -> None:
    rank, world_size = int(os.environ["RANK"]), launched().world_size
    said: dict[str, list[str]] = {}
    # Where the guards of the trainings meet.
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*place, is_master=rank == 0, wait_for_workers=False, timeout=datetime.timedelta(seconds=60))
    version = agreement._version
    for number, (name, path, overrides, other) in enumerate(plan()):
        wrong = [item.partition("=")[2] for item in other if item.startswith("version=")]
        given = {"torch": wrong[0]} if wrong and rank == 1 else {}
        agreement._version = lambda package, given=given: given.get(package) or version(package)
        mine = [*overrides, *(item for item in other if rank == 1 and not item.startswith("version="))]
        recipe = recipes.load(path, mine)
        meeting = join(number)
        try:
            train.run(recipe, "cpu")
            text = ""
        except UserError as error:
            text = f"{type(error).__name__}: {error}"
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.PrefixStore("then", meeting), rank=rank, world_size=world_size)
        said[name] = layout.all_gather(text)
        leave()
    write(said)
    # The store lives in rank 0, which is therefore the last to leave; nobody else reads from it, because an answer could be cut off.
    end = dist.PrefixStore("end", store)
    end.set(str(rank), "")
    if rank == 0:
        end.wait([str(other) for other in range(world_size)])


if __name__ == "__main__":
    main()
