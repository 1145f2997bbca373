"""Every engine takes its steps on a CUDA device without a wait: in a step the host reads nothing of it, and brings it nothing.

The engines are the real ones: megatron-core, torch's `fully_shard`, DeepSpeed. What DeepSpeed still waits for is named here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_scale.engines.zero_engine import norm_on_device
from bd3_scale.optimizers.adamw import SkipStepRule
from bd3_scale.reporting.metrics import Meter
from tests.fake_cuda.device import DEVICE, fake_cuda
from tests.fake_cuda.engines_worker import ENGINES, MICRO_BATCHES

BACKWARD_2 = "synchronize: runtime/zero/stage_1_and_2.py:1028"
BACKWARD_3 = "synchronize: runtime/zero/stage3.py:1414"
ALONE_3 = "synchronize: runtime/zero/partition_parameters.py:114"
"""ZeRO 3 of a single rank waits for weights that it has; with others it waits for a collective, on the device."""
NORM_3 = "copy of memory that is not pinned: runtime/zero/stage3.py:2483"
"""The number -1, of each group of parameters."""
KNOWN: dict[str, dict[str, int]] = {
    "deepspeed, zero 1, fp32": {BACKWARD_2: 1},
    "deepspeed, zero 2, bf16": {BACKWARD_2: MICRO_BATCHES},
    "deepspeed, zero 3, bf16": {BACKWARD_3: MICRO_BATCHES, NORM_3: 2, ALONE_3: 1},
}
"""Waits of DeepSpeed 0.19.8 in a step, none of which is for a number that the host reads."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("engines") / "out.json"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "tests/fake_cuda/engines_worker.py", str(out)]
    finished = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=900, check=False
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step(trained: dict[str, Any], engine: str, record_property: Callable[[str, object], None]) -> None:
    found = trained[engine]
    assert "error" not in found, found["error"]
    waits = Counter(found["step"])
    reads = sum(count for place, count in waits.items() if not place.startswith(("synchronize", "copy of memory")))
    record_property(
        "table",
        f"fake CUDA device, a step of {MICRO_BATCHES} micro-batches, {engine:26s} {reads} reads, {waits.total()} waits {dict(waits) or ''}",
    )
    assert reads == 0 and waits == KNOWN.get(engine, {})
    assert Counter(found["evaluated"]).keys() <= {ALONE_3}
    assert found["logged"] == 1, "loss and norm, together"


@pytest.mark.parametrize("found", [1.5, -1.0, float("inf"), torch.ones(())])
def test_whatever_deepspeed_answers_as_a_norm_is_on_the_device(found: Any) -> None:
    """It answers a number of Python where the gradient is not finite; losses and other norms are on the device then."""
    with fake_cuda() as device:
        if isinstance(found, torch.Tensor):
            found = torch.ones((), device=DEVICE, dtype=torch.bfloat16)
        meter, rule = Meter(DEVICE, 0, None), SkipStepRule(3.0, DEVICE)
        for norm in (torch.ones((), device=DEVICE), norm_on_device(found, DEVICE)):
            assert rule.should_skip(norm).is_cuda
            meter.add(torch.zeros((), device=DEVICE), norm)
        assert not device.waits
        device.answer = 1
        assert meter.read(10, lambda value: value, 1.0)["gradient_norm"] == 1
    assert device.waits.total() == 1
