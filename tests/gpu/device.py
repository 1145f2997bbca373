"""Where the tests of this folder run: on the GPU, or, as a rehearsal of the tests themselves, on a CPU.

`pytest tests/gpu` needs CUDA and is skipped without. With BD3_GPU_REHEARSAL=cpu everything runs on the CPU with its own kernels and
fewer steps, so that a test that is itself wrong is found before a GPU is at hand; what it then says about GPUs is nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

REHEARSAL = os.environ.get("BD3_GPU_REHEARSAL") == "cpu"
DEVICE = torch.device("cpu") if REHEARSAL else torch.device("cuda", 0)
KERNEL = "tiled" if REHEARSAL else "flex"
"""FlexAttention has no backward on CPU."""

needs_gpu = pytest.mark.skipif(
    not (REHEARSAL or torch.cuda.is_available()), reason="needs a CUDA device (BD3_GPU_REHEARSAL=cpu tries the tests themselves)"
)


@contextmanager
def world() -> Iterator[None]:
    """A world of this process alone, on the device."""
    from bd3_scale.distributed import layout
    from bd3_scale.recipe.schema import ParallelConfig

    layout.start(ParallelConfig(), DEVICE.type)
    try:
        yield
    finally:
        layout.stop()
