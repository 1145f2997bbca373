"""What a person sees of a run: a progress line, metrics.jsonl, wandb, plots. Only the leader writes; every rank may call.

Invariant: a training line always has the same keys; train loss and NELBO are different numbers and never mixed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.costs.flops import peak_flops, training_flops_per_token
from bd3_scale.costs.pipeline_stages import selected_share
from bd3_scale.data.preparation.packing import texts_end_at
from bd3_scale.distributed.layout import Layout
from bd3_scale.engines.kernel_probe import Probed, as_line, as_text
from bd3_scale.errors import TrainingError
from bd3_scale.messages import log
from bd3_scale.recipe import Recipe, resolve_precision, to_yaml
from bd3_scale.recipe.schema import ModelConfig, ObjectiveConfig, TrainingConfig
from bd3_scale.recipe.text import as_yaml
from bd3_scale.reporting.metrics import Meter, MetricsFile, read_metrics
from bd3_scale.reporting.plots import draw
from bd3_scale.reporting.tensorboard import TensorBoard
from bd3_scale.reporting.tracking import Tracker
from bd3_scale.reporting.web_page import write_page
from bd3_scale.tuning.estimates import Validated, Validation
from bd3_scale.tuning.interval_tuner import Choice, TunerState

PLOTS_TAKE = 0.01
"""The most that drawing plots takes of a run's time, but for the first and the last ones."""


class Reporter:
    """Opens the run directory's files; `first_step` is 0 or the step that is continued."""

    def __init__(
        self,
        recipe: Recipe,
        layout: Layout,
        folder: Path,
        *,
        first_step: int,
        wandb: str | None = None,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        """`wandb`: the id of a run there that goes on. `may_write`: see MetricsFile."""
        self.recipe, self.layout, self.folder, self.first_step = recipe, layout, folder, first_step
        self.file: MetricsFile | None = None
        self.plots_wait_until = 0.0
        self.spent: dict[str, float] = {}
        """Seconds on other things than the steps themselves since the last validation."""
        self.wandb = wandb
        """What checkpoints keep."""
        if layout.is_main_rank:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(to_yaml(recipe))
            self.file = MetricsFile(folder / "metrics.jsonl", first_step, may_write)
            self.tracker = Tracker(recipe, folder, wandb)
            self.wandb = self.tracker.run_id
            self.tensorboard = TensorBoard(recipe.tracking.tensorboard, folder, first_step)
            self.bar = None  # on a terminal a progress bar, elsewhere plain lines
            if recipe.tracking.progress and sys.stderr.isatty():
                self.bar = tqdm(total=recipe.total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.05)
            if (ends := texts_end_at(recipe.data.row_special, recipe.model.context)) is not None:
                self.say(ends)
        # Last, so that neither the start of wandb nor a long metrics.jsonl is counted as training.
        self.began = time.perf_counter()
        self.meter = Meter(layout.device, recipe.tokens_before(first_step), _peak(recipe.training, layout))

    def probed(self, found: Sequence[Probed]) -> None:
        """Say and write down which kernels were tried and work; see engines/kernel_probe.py."""
        for one in found:
            self.say(as_text(one))
            if self.file is not None:
                self._write({**as_line(one), "step": self.first_step})

    def continued(self, step: int, amendments: Sequence[dict[str, Any]], remarks: Sequence[str]) -> None:
        """Say and write down what is other from `step` on."""
        for remark in remarks:
            self.warning(step, remark)
        for one in (one for one in amendments if one["step"] == step):
            self.say(f"run.amend: {one['key']} is {as_yaml(one['now'])} from step {step} on, {as_yaml(one['before'])} before")
            if self.file is not None:
                self._write({"kind": "amendment", **one})

    def add(self, loss: Tensor, norm: Tensor, control: float = 0.0, counted: float = 1.0) -> None:
        """A step was made; see `Meter.add`."""
        self.meter.add(loss, norm, control, counted)

    def train(
        self,
        *,
        step: int,
        learning_rate: float,
        intervals: Mapping[int, list[float]],
        flops_per_token: float,
        reduce: Callable[[Tensor], Tensor],
        skipped: Tensor,
        pace: Callable[[Callable[[str], None]], dict[str, float]] = lambda tell: {},
    ) -> dict[str, Any]:
        """Write a training line of the steps since the last one; collective over the replicas. `intervals`: {L': interval}, of a mixture
        several, the largest share first, which is the one of the line's own. `flops_per_token`: see `Meter.read`;
        `skipped`: counts of `SkipStepRule`; `pace`: see `Pace.read`."""
        tokens = self.recipe.tokens_before(step)
        values = self.meter.read(tokens, reduce, flops_per_token)
        if not self.recipe.tracking.control_variate:
            del values["controlled_loss"]
        _, values["skipped_steps"], values["skipped_in_a_row"] = skipped.tolist()
        interval = next(iter(intervals.values()))
        line = {"kind": "train", "step": step, "data_tokens": tokens, "learning_rate": learning_rate, "interval": interval, **values}
        if len(intervals) > 1:
            line["intervals"] = {str(size): one for size, one in intervals.items()}
        if own := pace(lambda text: self.warning(step, text)):
            line["own_seconds"] = own
        if self.file is not None:
            self._write(line)
            self._progress(line)
        return line

    def validation(
        self,
        *,
        step: int,
        results: Mapping[int, Validated],
        seconds: float,
        unigram_perplexity: float | None,
        sets: Mapping[str, Mapping[int, Validated]] = MappingProxyType({}),
    ) -> None:
        """Write a validation line of the first of `results` ({L': result}), with those of all block sizes where there are several, and such
        a line of kind validation/NAME for each of other `sets`; the `seconds` that all took are not counted as training time. The first
        line says what the leader has spent on what since the last one (`spent`, seconds)."""
        self.skip(seconds, "validation")
        spent, self.spent = self.spent, {}
        if self.file is None:
            return
        for kind, measured in {"validation": results, **{f"validation/{name}": one for name, one in sets.items()}}.items():
            first = next(iter(measured.values()))
            line: dict[str, Any] = {"kind": kind, "step": step, "data_tokens": self.recipe.tokens_before(step), **asdict(first)}
            if kind == "validation" and unigram_perplexity is not None and isinstance(first, Validation):
                line["unigram_perplexity"] = unigram_perplexity
            if kind == "validation":
                line["spent"] = {what: round(value, 3) for what, value in spent.items()}
            if len(measured) > 1:
                line["block_sizes"] = {str(size): asdict(one) for size, one in measured.items()}
            self._write(line)
            for size, one in measured.items():
                self.say(f"step {step}: {kind} {one}{f' at block size {size}' if len(measured) > 1 else ''}")
        self.plot()

    def tuner(
        self,
        *,
        step: int,
        choice: Choice,
        intervals: Sequence[tuple[float, float]],
        variances: np.ndarray,
        block_size: int | None = None,
    ) -> None:
        """Write a tuner line: what was chosen and the variance of every candidate; `block_size`: of a mixture, the one tuned."""
        if self.file is None:
            return
        all_variances = [{"interval": list(interval), "variance": float(v)} for interval, v in zip(intervals, variances, strict=True)]
        line = {
            "kind": "tuner",
            "step": step,
            "interval": list(choice.interval),
            "variance": choice.variance,
            "changed": choice.changed,
            "variances": all_variances,
        }
        if block_size is not None:
            line["block_size"] = block_size
        if density := choice.density:
            line |= {"density": list(density.learned), "density_variance": density.variance, "uniform_variance": density.uniform_variance}
        self._write(line)
        verb = "changes to" if choice.changed else "stays"
        of = "" if block_size is None else f" of block size {block_size}"
        if self.recipe.tuner.kind != "density":
            self.say(f"step {step}: the interval{of} {verb} {list(choice.interval)} (variance {choice.variance:.3g})")
        if density:
            verb, times = "changes" if density.changed else "stays", density.variance / density.uniform_variance
            self.say(f"step {step}: the density of t{of} {verb} (variance {density.variance:.3g}, {times:.2f} times that of a uniform one)")
        self.plot()

    def skip(self, seconds: float, what: str) -> None:
        """Leave time that was spent on `what`, and not on training, out of data tokens/s and MFU."""
        self.meter.skip(seconds)
        self.took(seconds, what)

    def took(self, seconds: float, what: str) -> None:
        """Count what the leader spent on `what`, for the next validation line."""
        self.spent[what] = self.spent.get(what, 0.0) + seconds

    def say(self, text: str) -> None:
        """A line for people."""
        if self.file is not None:
            log.info(text)

    def warning(self, step: int, text: str) -> None:
        """Say loudly what threatens the run, and count it in metrics.jsonl as far as the file system takes it."""
        if self.file is None:
            return
        log.warning(text)
        try:
            self._write({"kind": "warning", "step": step, "text": text})
        except TrainingError as error:  # the same full disk, most likely, and it has been said
            log.warning(error)

    def plot(self, *, now: bool = False) -> None:
        """Draw report/*.png and report/index.html from metrics.jsonl, unless that was done a short while ago. All other ranks wait for the
        leader, so it does not draw often (`now`: whenever it was). A picture that fails is said and stops nothing; its time is not
        training."""
        start = time.perf_counter()
        if self.file is None or not self.recipe.tracking.plots or (start < self.plots_wait_until and not now):
            return
        try:
            lines, report = read_metrics(self.file.path), self.folder / "report"
            draw({self.folder.resolve().name: lines}, report)
            write_page(self.recipe, self.layout.world_size, lines, report)
        except Exception as error:  # a full disk, a font cache that cannot be written: no reason to lose a run
            log.warning(f"no plots ({type(error).__name__}: {error}); draw them later with bd3 plot")
        seconds = time.perf_counter() - start
        self.plots_wait_until = start + seconds / PLOTS_TAKE
        self.skip(seconds, "pictures")

    def close(self) -> None:
        """End the progress line and wandb, draw the last plots."""
        if self.file is not None:
            if self.bar is not None:
                self.bar.close()
            self.plot(now=True)
            self.tracker.close()
            self.tensorboard.close()

    def _write(self, line: dict[str, Any]) -> None:
        assert self.file is not None
        written = self.file.write(line)
        self.tracker.log(written)
        self.tensorboard.log(written)

    def _progress(self, line: dict[str, Any]) -> None:
        total, step = self.recipe.total_steps, line["step"]
        mfu = "" if line["mfu"] is None else f", MFU {line['mfu']:.1%}"
        text = f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} data tokens/s{mfu}, lr {line['learning_rate']:.2e}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif self.recipe.tracking.progress:
            first, now, end = (self.recipe.tokens_before(step) for step in (self.first_step, step, total))
            left = (time.perf_counter() - self.began) / max(1, now - first) * (end - now)
            print(f"step {step}/{total}: {text}, ETA {tqdm.format_interval(left)}", file=sys.stderr, flush=True)


def _peak(training: TrainingConfig, layout: Layout) -> float | None:
    if layout.device.type != "cuda":
        return None
    one = peak_flops(torch.cuda.get_device_name(layout.device), resolve_precision(training, "cuda"))
    return None if one is None else one * layout.world_size


def flops_per_token(
    model: ModelConfig, objective: ObjectiveConfig, pattern: AttentionPattern, vocabulary: int, tuning: TunerState | None = None
) -> float:
    """Model FLOPs of a training step per data token, with the expected share of masked positions, as tuned where it is.

    Recomputed forwards are not counted: MFU says what came out, and activation checkpointing must not raise it.
    """
    share = selected_share(objective, pattern, tuning)
    return training_flops_per_token(model, pattern, vocabulary, share, simplex=objective.traits.on_simplex)
