"""tools/benchmark.py: the instrument runs at a tiny size, refuses sides that do not compute the same, and its memory fit tells a curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--layers", "2", "--hidden", "64", "--heads", "2"]


def run(out: Path, name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "tools/benchmark.py", "--device", "cpu", "--rounds", "1", "--out", str(out), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, *(SMALL if name != "world" else []), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (report,) = out.glob(f"*-{name}.json")
    assert report.with_suffix(".md").read_text().startswith("# ")
    return json.loads(report.read_text())["result"]


def test_features_are_switched_off_one_by_one(tmp_path: Path) -> None:
    result = run(tmp_path, "features", "--context", "128")
    assert len(result["median_seconds"]) == 10 and all(seconds > 0 for seconds in result["median_seconds"].values())
    assert result["logits of all L noisy positions: peak memory"] > 1.1


@pytest.mark.parametrize("recompute", [[], ["--recompute", "mlp"]], ids=["whole", "recomputed"])
def test_device_benchmark_is_rehearsed(tmp_path: Path, recompute: list[str]) -> None:
    """What runs on a GPU where one is at hand, at a tiny size here."""
    result = run(tmp_path, "device", "--contexts", "64", "128", *recompute)
    assert result["parity_with_cpu"] == {"loss": 0.0, "gradients": 0.0}, "this is the CPU"
    for context in (64, 128):
        one = result[f"L = {context}"]
        assert list(one["attention_flops_per_second_over_causal_flash"]) == ["auto"] and one["seconds_by_compile"]["none"] > 0
        assert one["block_diffusion_over_autoregressive_time"] > 0 and sum(one["share_of_time"].values()) == pytest.approx(1)


def test_limits_are_measured_at_the_shapes_of_a_layer(tmp_path: Path) -> None:
    result = run(tmp_path, "limits", "--context", "128", "--micro-batch", "1")
    shapes = [product["rows_inputs_outputs"] for product in result["products"]]
    assert shapes == [[240, 64, 64], [240, 64, 128], [240, 64, 64], [240, 64, 352], [240, 176, 64]]
    rates = [rate for product in result["products"] for rate in product["flops_per_second"].values()]
    rates += [result["memory_bytes_per_second"], *result["flex"]["flops_per_second"], *result["sdpa"]["flops_per_second"]]
    assert all(rate > 0 for rate in rates) and set(result["head_loss_seconds"]) == {"eager", "fused"}
    assert "reached" not in result, "no device of the table"


def test_one_block_is_masked_diffusion(tmp_path: Path) -> None:
    result = run(tmp_path, "one-block", "--context", "64", "--micro-batch", "2")
    assert set(result["median_seconds"]) == {"block diffusion", "masked diffusion", "autoregressive"}
    assert result["the_same_in_exact_flops"] < 1.2, "half the logits for twice the pairs"


def test_draws_cost_what_their_rows_cost(tmp_path: Path) -> None:
    result = run(tmp_path, "draws", "--context", "64")  # checks that their losses are one
    exact = result["the_same_in_exact_flops"]
    assert 0.9 < exact["4 draws"] < exact["2 draws"] < exact["1 draws"] == 1, "most of so small a network is its head"


def test_a_thousand_ranks_are_simulated(tmp_path: Path) -> None:
    """Done when: an index below 5 MB, and half a gigabyte a rank for what start and save keep account of. Times are only measured."""
    result = run(tmp_path, "world", "--ranks", "1024", "--shards", "2000")["1024 ranks"]
    assert result["parts"] > 500_000 and result["index bytes"] < 5e6
    assert result["memory bytes above the imports, saving included"] < 0.5e9
