"""The figure of the README: the mask, and the loss curves of several layouts and of a killed run, which are one line.

    python docs/figures/layouts_on_one_line.py train /tmp/figure     trains and writes layouts_on_one_line.json beside this file
    python docs/figures/layouts_on_one_line.py draw                  draws layouts_on_one_line.png from it

The first trains a small network on text of bytes five times, some minutes on two cores; the second needs no training.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUMBERS, PICTURE = (Path(__file__).with_suffix(ending) for ending in (".json", ".png"))
RECIPE = [
    "recipes/quickstart.yaml", "data.path=~/.cache/bd3_scale/documentation-bytes-128", "data.tokenizer=bytes", "data.source_tokens=3000000",
    "model.layers=4", "model.hidden=64", "model.initial_std=0.125", "model.dropout=0.1", "training.steps=120", "training.warmup=8",
    "parallel.micro_batch=2", "validation.every=0", "checkpoint.every=30", "tracking.every=1", "tracking.sample_tokens=0",
]  # fmt: skip
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "2 ranks, ZeRO 3": (2, ["parallel.zero=3"]),
    "2 ranks, tensor and sequence parallel": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "2 ranks, pipeline, interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_stages=2"]),
}
KILLED, KILLED_AT = "killed at step 70 on 1 rank, continued on 2 (ZeRO 2)", 70


def train(work: Path) -> None:
    """Train every layout, and one run that is killed and continued, into `work`; write the losses of all steps."""
    losses = {}
    for number, (name, (ranks, keys)) in enumerate(LAYOUTS.items()):
        job = _start(ranks, [*keys, f"run.dir={work / str(number)}"])
        assert job.wait() == 0, name
        losses[name] = _losses(work / str(number))
    folder = work / "killed"
    job = _start(1, [f"run.dir={folder}"])
    while len(_losses(folder)) < KILLED_AT:
        assert job.poll() is None, "ended before it was killed"
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert _start(2, ["parallel.zero=2", f"run.dir={folder}"]).wait() == 0
    losses[KILLED] = _losses(folder)
    NUMBERS.write_text(json.dumps({"recipe": RECIPE, "losses": losses}, indent=1) + "\n")


def _start(ranks: int, keys: list[str]) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *launcher, "-m", "bd3_scale.train", *RECIPE, *keys], cwd=ROOT, env=environment)


def _losses(folder: Path) -> list[float]:
    """Train loss of every step, nats per data token; what a killed process left unfinished of a line is passed over."""
    file = folder / "metrics.jsonl"
    whole = file.read_text().splitlines(keepends=True) if file.exists() else []
    lines = [json.loads(line) for line in whole if line.endswith("\n")]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def draw() -> None:
    """Draw the mask, the curves, and how far they are apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.1), width_ratios=[1, 1.25, 1.25], layout="constrained")
    _draw_mask(left)
    losses: dict[str, list[float]] = json.loads(NUMBERS.read_text())["losses"]
    first = losses["one process"]
    steps = range(1, len(first) + 1)
    for number, (name, values) in enumerate(losses.items()):
        style: Any = (0, (3, 3)) if number else "-"
        middle.plot(steps, values, linewidth=9 - 1.8 * number, linestyle="-" if number < 4 else style, label=name, color=f"C{number}")
        if number:
            apart = [max(abs(value / reference - 1), 1e-9) for value, reference in zip(values, first, strict=True)]
            right.semilogy(steps, apart, ".", markersize=4, label=name, color=f"C{number}")
    middle.set(xlabel="step", ylabel="train loss, nats per data token", title="Loss of four layouts and of a killed run")
    middle.legend(fontsize=8, frameon=False)
    right.axhline(1e-5, color="black", linestyle="--", linewidth=1)
    right.text(2, 1.15e-5, "what the tests allow", fontsize=8)
    right.axvline(KILLED_AT, color="C4", linewidth=1, alpha=0.5)
    right.text(2, 6e-10, "equal", fontsize=8)
    right.set(xlabel="step", ylim=(4e-10, 1e-4), title="Relative distance from one process")
    figure.savefig(PICTURE, dpi=90)


def _draw_mask(axis: Any) -> None:
    """Which row of [x_t ; x_0] sees which, for L = 16 and L' = 4, by the definition that training uses."""
    import numpy as np
    import torch
    from matplotlib.colors import ListedColormap

    from bd3_scale.attention.mask import AttentionPattern, visible

    pattern = AttentionPattern("block_diffusion", 16, 4)
    row = torch.arange(pattern.rows)
    seen = visible(pattern, row[:, None], row[None, :]).numpy()
    half = np.arange(pattern.rows) >= pattern.length
    kind = 1 + half[None, :] * 1 + half[:, None] * 1  # 1: noisy sees noisy, 2: noisy sees clean, 3: clean sees clean
    axis.imshow(np.where(seen, kind, 0), cmap=ListedColormap(["#f2f2f2", "#4c72b0", "#dd8452", "#55a868"]), vmin=0, vmax=3)
    for edge in range(0, pattern.rows + 1, pattern.block_size):
        axis.axhline(edge - 0.5, color="white", linewidth=1)
        axis.axvline(edge - 0.5, color="white", linewidth=1)
    axis.set(title="Who sees whom: L = 16, L' = 4", xticks=[7.5, 23.5], yticks=[7.5, 23.5], xlabel="seen row", ylabel="row")
    axis.set_xticklabels(["$x_t$, noisy", "$x_0$, clean"])
    axis.set_yticklabels(["$x_t$, noisy", "$x_0$, clean"], rotation=90, va="center")


if __name__ == "__main__":
    if sys.argv[1:2] == ["draw"]:
        draw()
    elif sys.argv[1:2] == ["train"] and len(sys.argv) == 3:
        train(Path(sys.argv[2]).resolve())
    else:
        sys.exit(__doc__)
