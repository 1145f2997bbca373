"""What a launcher tells this process: its rank, who else it started, and what share of the cores is its own.

Whoever has a `Layout` asks that instead. torch takes all cores, or OMP_NUM_THREADS; and torchrun sets OMP_NUM_THREADS=1 for several
processes, whatever the machine: of a laptop with 16 cores two processes would use two. Here the cores that this process may use are
shared by the processes of the host, unless somebody chose.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launched:
    """This process as torchrun, or srun through torchrun, started it; alone without a launcher."""

    rank: int
    world_size: int
    local_rank: int
    """Among the ranks of this host."""
    local_world_size: int
    numbered: bool
    """Whether somebody gave this process its rank; else it is alone and needs no place to meet others."""

    def ranks_of_this_host(self, rank: int) -> range:
        """The ranks that the launcher started beside `rank` here, as far as it says so."""
        first = rank - self.local_rank
        return range(first, first + self.local_world_size) if self.local_rank < self.local_world_size else range(rank, rank + 1)


def launched(environment: Mapping[str, str] = os.environ) -> Launched:
    """The only reader of the launcher's variables."""
    rank, local_rank = (int(environment.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    world_size, local_world_size = (int(environment.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return Launched(rank, world_size, local_rank, local_world_size, "RANK" in environment)


def threads_of_a_process(asked: int | None, environment: Mapping[str, str], cores: int) -> int | None:
    """Threads to set, or None to leave torch's choice (one process, or OMP_NUM_THREADS set by the user).

    `asked`: run.threads; `cores`: those that this process may run on.
    """
    if asked is not None:
        return asked
    chosen = environment.get("OMP_NUM_THREADS")
    started_by_torchrun = "TORCHELASTIC_RUN_ID" in environment
    if chosen is not None and not (started_by_torchrun and chosen == "1"):
        return None
    processes = launched(environment).local_world_size
    return max(1, cores // processes) if processes > 1 else None


def set_threads(asked: int | None) -> None:
    """On CPU, before the first computation."""
    import torch

    threads = threads_of_a_process(asked, os.environ, len(os.sched_getaffinity(0)))
    if threads is not None:
        torch.set_num_threads(threads)
