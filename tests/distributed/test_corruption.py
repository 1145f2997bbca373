"""Silent data corruption on one replica is found by the next save, which names rank and host, and never becomes `latest`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.forked import run_ranks
from tests.distributed.launch import ALL

LAYOUTS = {"zero 0": ["parallel.zero=0"], "copies of two": ["parallel.zero=3", "parallel.engine=fsdp", "parallel.shard=2"]}


@pytest.mark.parametrize("layout", list(LAYOUTS) if ALL else ["copies of two"])
def test_one_bit_on_one_replica_is_found(recipe: Path, tmp_path: Path, layout: str) -> None:
    run = tmp_path / "run"
    often = ["training.steps=6", "checkpoint.every=2", "validation.every=0", "parallel.micro_batch=2"]
    finished = run_ranks(
        4, ["tests/distributed/corrupt_worker.py", str(recipe), f"run.dir={run}", *often, *LAYOUTS[layout]], tmp_path / "log"
    )
    assert finished.status != 0
    named = "rank 2 (host" if layout == "zero 0" else "rank 0 (host"  # of two copies nobody knows which is right: ranks 0 and 2
    assert f"the weights of {named}" in finished.output and "rank 1 (host" not in finished.output, finished.output[-4000:]
    assert "rank 2 (host" in finished.output
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000002", "saved before the bit flipped, and undisturbed"
