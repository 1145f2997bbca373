"""The cores are shared by the processes of a host, unless somebody chose."""

from __future__ import annotations

import pytest

from bd3_scale.launcher import threads_of_a_process

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("asked", "environment", "threads"),
    [
        (None, {}, None),
        (None, {"OMP_NUM_THREADS": "3"}, None),
        (None, {"OMP_NUM_THREADS": "1"}, None),
        (None, {"LOCAL_WORLD_SIZE": "4"}, 4),
        (None, TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, 4),
        (None, TORCHRUN | {"LOCAL_WORLD_SIZE": "64"}, 1),
        (None, TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "2"}, None),
        (7, TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, 7),
        (7, {"OMP_NUM_THREADS": "3"}, 7),
    ],
)
def test_threads(asked: int | None, environment: dict[str, str], threads: int | None) -> None:
    assert threads_of_a_process(asked, environment, cores=16) == threads
