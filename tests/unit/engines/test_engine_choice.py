"""Which engine stands behind a layout, what it is not asked to import, and how much it sends at a time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bd3_scale.costs.sizes import SMALLEST_BUCKET, bucket_elements
from bd3_scale.recipe.schema import ParallelConfig


@pytest.mark.parametrize(
    ("zero", "pipeline", "engine"),
    [
        (0, 1, "megatron"),
        (1, 1, "megatron"),
        (0, 4, "megatron"),
        (1, 2, "megatron"),
        (2, 1, "deepspeed"),
        (3, 1, "deepspeed"),
        (3, 2, "fsdp"),
    ],
)
def test_the_engine_of_a_layout(zero: int, pipeline: int, engine: str) -> None:
    assert ParallelConfig(zero=zero, pipeline=pipeline).resolved_engine == engine
    assert ParallelConfig(zero=zero, pipeline=pipeline, engine="deepspeed").resolved_engine == "deepspeed"


def test_a_run_without_deepspeed_does_not_import_it() -> None:
    code = "import sys, bd3_scale.train, bd3_scale.training.trainer, bd3_scale.engines.megatron_engine; print('deepspeed' in sys.modules)"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert found.stdout.split() == ["False"]


def test_buckets_are_an_eighth_within_limits() -> None:
    assert bucket_elements(600_000, 8) == SMALLEST_BUCKET, "one message of a small network"
    assert bucket_elements(170_000_000, 8) == 170_000_000 // 8
    assert bucket_elements(7_000_000_000, 8) == 40_000_000
    assert bucket_elements(7_000_000_000, 256) == 256_000_000, "as many elements for each of many ranks as megatron-core sends"
