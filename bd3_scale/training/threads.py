"""How many threads each process computes with on CPU.

torch takes all cores, or OMP_NUM_THREADS; and torchrun sets OMP_NUM_THREADS=1 for several processes, whatever the machine: of a laptop with
16 cores two processes would use two. Here the cores that this process may use are shared by the processes of the host, unless somebody
chose. Invariant: results depend on the number of threads by rounding alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from bd3_scale.launcher import launched


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
