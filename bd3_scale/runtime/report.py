"""What a person sees of a run: a progress line, metrics.jsonl, wandb, plots. Only the leader writes; every rank may call.

Invariant: a training line has the keys of design.md section 3; train loss and NELBO are different numbers and never mixed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bd3_scale.config import Recipe, resolve_precision, to_yaml
from bd3_scale.model.flops import peak_flops, training_flops_per_token
from bd3_scale.parallel.layout import Layout
from bd3_scale.runtime.metrics import Meter, MetricsFile, read_metrics
from bd3_scale.runtime.plots import draw
from bd3_scale.runtime.tracking import Tracker
from bd3_scale.runtime.validation import Validation


class Reporter:
    """Opens the run directory's files; `first_step` is 0 or the step that is continued."""

    def __init__(
        self, recipe: Recipe, layout: Layout, folder: Path, run_state: dict[str, Any], *, first_step: int, flops_per_token: float
    ) -> None:
        self.recipe, self.layout, self.folder, self.first_step = recipe, layout, folder, first_step
        tokens = first_step * recipe.tokens_per_step
        self.meter = Meter(layout.device, tokens, flops_per_token, _peak(recipe, layout))
        self.file: MetricsFile | None = None
        if layout.leader:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(to_yaml(recipe))
            self.file = MetricsFile(folder / "metrics.jsonl", first_step)
            self.tracker = Tracker(recipe, folder, run_state)
            self.bar = _bar(recipe, first_step)
            self.began = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """A step was made; see `Meter.add`."""
        self.meter.add(loss, norm)

    def train(self, *, step: int, learning_rate: float, interval: list[float], reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Write a training line of the steps since the last one; collective over the replicas."""
        tokens = step * self.recipe.tokens_per_step
        values = self.meter.read(tokens, reduce)
        line = {"kind": "train", "step": step, "data_tokens": tokens, "learning_rate": learning_rate, "interval": interval, **values}
        if self.file is not None:
            self._write(line)
            self._progress(line)
        return line

    def validation(self, *, step: int, result: Validation, seconds: float, unigram_perplexity: float | None) -> None:
        """Write a validation line; `seconds` it took are not counted as training time."""
        self.meter.skip(seconds)
        if self.file is None:
            return
        line: dict[str, Any] = {
            "kind": "validation",
            "step": step,
            "data_tokens": step * self.recipe.tokens_per_step,
            "nelbo": result.nelbo,
            "standard_error": result.standard_error,
            "perplexity": result.perplexity,
            "rows": result.rows,
        }
        if unigram_perplexity is not None:
            line["unigram_perplexity"] = unigram_perplexity
        self._write(line)
        self.say(f"step {step}: validation NELBO {result.nelbo:.4f} +- {result.standard_error:.4f}, perplexity {result.perplexity:.2f}")
        self.plot()

    def say(self, text: str) -> None:
        """A line for people."""
        if self.file is not None:
            tqdm.write(text, file=sys.stderr) if self.bar is not None else print(text, file=sys.stderr, flush=True)

    def plot(self) -> None:
        """Draw report/*.png from metrics.jsonl."""
        if self.file is not None:
            draw({self.recipe.run.name: read_metrics(self.file.path)}, self.folder / "report")

    def close(self) -> None:
        """End the progress line and wandb, draw the last plots."""
        if self.file is not None:
            if self.bar is not None:
                self.bar.close()
            self.plot()
            self.tracker.close()

    def _write(self, line: dict[str, Any]) -> None:
        assert self.file is not None
        self.tracker.log(self.file.write(line))

    def _progress(self, line: dict[str, Any]) -> None:
        total, step = self.recipe.total_steps, line["step"]
        mfu = "" if line["mfu"] is None else f", MFU {line['mfu']:.1%}"
        text = f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} data tokens/s{mfu}, lr {line['learning_rate']:.2e}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif self.recipe.tracking.progress:
            left = (time.perf_counter() - self.began) / max(1, step - self.first_step) * (total - step)
            print(f"step {step}/{total}: {text}, ETA {tqdm.format_interval(left)}", file=sys.stderr, flush=True)


def _bar(recipe: Recipe, first_step: int) -> Any:
    """A progress bar on a terminal; plain lines elsewhere."""
    if not (recipe.tracking.progress and sys.stderr.isatty()):
        return None
    return tqdm(total=recipe.total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.05)


def _peak(recipe: Recipe, layout: Layout) -> float | None:
    if layout.device.type != "cuda":
        return None
    one = peak_flops(torch.cuda.get_device_name(layout.device), resolve_precision(recipe, "cuda"))
    return None if one is None else one * layout.world_size


def flops_per_token(recipe: Recipe, pattern: Any, vocabulary: int) -> float:
    """FLOPs of a training step per data token, as really computed, with the expected share of masked positions."""
    selected = sum(recipe.objective.interval) / 2
    return training_flops_per_token(recipe.model, pattern, vocabulary, selected, recompute=recipe.training.recompute)
