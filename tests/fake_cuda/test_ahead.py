"""Every shape of attention compiles for an H100 into a kernel that fits, in bf16 with its matrix units; without the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fake_cuda.ahead_cases import CASES

SPILLED_AT_MOST = 512
"""Bytes of stores that ptxas puts into a kernel for want of registers (in fp32, which has no matrix units, it is thousands)."""


@pytest.mark.cuda_build
def test_flex_attention_compiles_for_sm_90(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("needs torch's CUDA build (a GPU it does not)")
    if "cuda_build" not in request.config.option.markexpr:
        pytest.skip("takes minutes: by hand, with pytest -m cuda_build -n 0")
    root, out = Path(__file__).parents[2], tmp_path / "out.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_cuda.ahead_worker", str(out)]
    finished = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=1100, check=False
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    found = json.loads(out.read_text())
    made = {(one["name"], one["backward"]) for one in found}
    assert made == {(case.name, backward) for case in CASES for backward in (False, True)}
    for one in found:
        assert one["registers"] <= 255 and one["shared"] <= 227 * 1024, one
        assert one["dtype"] == "float32" or (one["wgmma"] and one["spilled"] <= SPILLED_AT_MOST), one
