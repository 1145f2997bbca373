"""What the commands that use a checkpoint (`sample`, `evaluate`) have in common: their errors, and the world they are one or many in.

Invariants: an error is one line, said once for all ranks; a world that the command joined is left in order, but for that of many ranks
after an error, which needs those that may never come.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist

from bd3_scale.errors import RecipeError, UserError
from bd3_scale.launcher import launched
from bd3_scale.recipe import settle

LEADER_SPEAKS = 20.0
"""Seconds that a rank with an error leaves to the first one, which usually has the same and ends the job by saying so."""


class CommandParser(argparse.ArgumentParser):
    """Bad options are errors of one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; see {self.prog} --help")


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes): in the world that was joined, or as torchrun says."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    told = launched()
    return told.rank, told.world_size


def end_with(error: UserError) -> int:
    """Say the error, once for all ranks, and leave. When one rank has left the launcher ends the others, which may wait for
    it in a collective: a rank that is still there long after has an error that the first does not have."""
    rank, world_size = rank_and_size()
    if rank > 0:
        time.sleep(LEADER_SPEAKS)
    error.say(where=f"[rank {rank}] " if rank > 0 else "")
    if world_size > 1 and dist.is_initialized():
        os._exit(error.exit_code)
    return error.exit_code


@contextmanager
def own_world() -> Iterator[None]:
    """The world that is joined inside is left at the end; one that the caller was in before is not."""
    settle()
    # It calls collectives by names that newer torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from bd3_scale.distributed import layout

    alone = not dist.is_initialized()
    try:
        yield
    finally:
        # With an error, not among many: leaving the world in order needs the others.
        if alone and (rank_and_size()[1] == 1 or sys.exc_info()[0] is None):
            layout.stop()
