"""`train.py` with a disk of its own making: `background_worker.py RECIPE OVERRIDES...`, steered by the environment.

FULL=rank:first-step: that rank cannot write its file from that step on. SLOW=step:flag: the write of that step's file touches the
file `flag` when half of it is there, and then never ends.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bd3_scale import train
from bd3_scale.checkpoint import store
from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.index import FileRecord

original = store.write_shard


def write_shard(path: Path, fragments: Sequence[Fragment]) -> FileRecord:
    step = int(path.parent.name.removeprefix("step_").partition(".")[0])
    if full := os.environ.get("FULL"):
        rank, first = map(int, full.split(":"))
        if int(os.environ.get("RANK", "0")) == rank and step >= first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if slow := os.environ.get("SLOW"):
        at, _, flag = slow.partition(":")
        if step == int(at):
            original(path, fragments[: max(1, len(fragments) // 2)])
            Path(flag).touch()
            time.sleep(600)
    return original(path, fragments)


if __name__ == "__main__":
    store.write_shard = write_shard  # type: ignore[assignment]
    sys.exit(train.main(sys.argv[1:]))
