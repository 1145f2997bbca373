"""A world that the recipe does not fit waits for nodes, where more may come, instead of failing: a failure would use up a restart.

After the loss of a node torchrun's elastic mode (`--nnodes 4:8`) starts the ranks again on the nodes that are left, and a recipe of
tensor x pipeline = 16 ranks does not fit 56. When a node joins, torchrun ends the ranks and starts them at the new size, which counts
as no restart (torch 2.13; for the joining see `JOINABLE`). So the ranks say why they wait and for how many, and sleep until they are
ended. Invariants: only a recipe that fits a larger world of this very job waits, any other ends with status 2 as before; outside of
elastic worlds nothing changes; a signal, and run.time_limit, end the wait at once and with status 0; who watches the run from outside
sees a heartbeat ("wait"), of the run directory's owner: where another job lives there, this one is refused as ever.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from bd3_scale.errors import RecipeError
from bd3_scale.launcher import launched
from bd3_scale.launching.node import JOINABLE
from bd3_scale.recipe import Recipe
from bd3_scale.rules.validate import validate

PAUSE = 1.0
"""Seconds between two looks at the clock."""
SHOWN = 8
"""Sizes in a line at most."""


def wait_for_nodes(recipe: Recipe, device: str, misfit: RecipeError) -> None:
    """Never return where `misfit` is only that of a world that may yet grow to one that fits; at once where it is not.

    To be called while signals end this process (`early_exit`). Raises RecipeError where another job owns `run.dir`, and TrainingError
    where one has taken over.
    """
    fitting = [ranks for ranks in larger_worlds() if _fits(recipe, ranks, device)]
    if not fitting:
        return
    from bd3_scale.distributed.waiting import Waiting, say
    from bd3_scale.fault_tolerance.early_exit import leave
    from bd3_scale.fault_tolerance.heartbeat_file import HeartbeatFile
    from bd3_scale.fault_tolerance.stop_request import seconds_left

    told = launched()
    leader, world = told.rank == 0, told.world_size
    sizes = f"{' or '.join(map(str, fitting[:SHOWN]))}{' or more' if len(fitting) > SHOWN else ''}"
    text = f"{world} ranks do not fit this recipe ({str(misfit).split('; ')[0]}), {sizes} would: waiting for nodes to join"
    if os.environ.get(JOINABLE) != "1":
        text += f"; but torchrun will fail when one joins, unless all of them are started with {JOINABLE}=1"
    waiting = Waiting(speaks=leader)
    if leader:
        say(text)
    folder = Path(recipe.run.dir)
    step, heartbeat, owner = _step_of(folder), HeartbeatFile(None, recipe.total_steps, world), None
    if leader and folder.is_dir():
        from bd3_scale.fault_tolerance.run_owner import own_alone

        owner = own_alone(folder)
        heartbeat = HeartbeatFile(folder, recipe.total_steps, world, may_write=owner.check)
    while True:
        heartbeat.beat(step, "wait")
        left = seconds_left(recipe.run.time_limit)
        if left is not None and left <= 0:
            if owner is not None:
                owner.release()
            leave("run.time_limit", leader)
        waiting.look(lambda: text)
        time.sleep(PAUSE if left is None else max(0.0, min(PAUSE, left)))


def larger_worlds() -> list[int]:
    """Numbers of ranks that torchrun may yet start in the place of this world; none where the world is not elastic."""
    from bd3_scale.launching import torchrun

    if not {"TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        return []
    told = torchrun.of_this_rank()
    if told is None or told.backend == "static":
        return []
    nodes, per_node = int(os.environ["GROUP_WORLD_SIZE"]), launched().local_world_size
    return [count * per_node for count in range(nodes + 1, told.most + 1)]


def _fits(recipe: Recipe, ranks: int, device: str) -> bool:
    try:
        validate(recipe, ranks, device)
    except RecipeError:
        return False
    return True


def _step_of(folder: Path) -> int:
    """Where the run stands, by its last heartbeat."""
    try:
        return int(json.loads((folder / "heartbeat.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
