"""What a launcher tells this process: its rank, and who else it started. Whoever has a `Layout` asks that instead."""

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
