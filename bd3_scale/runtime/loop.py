"""The training run: take inputs, forward-backward, step, EMA, log, validate, tune, save, stop - and nothing else.

All state that a resume needs is (weights, moments, EMA, step, samples consumed, a small dictionary): none of it depends
on the number of ranks. Everything random is keyed by (seed, step, place in the global batch). Nothing waits for the
device between logging steps.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bd3_scale import config as recipes
from bd3_scale.checkpoint.background import Saver
from bd3_scale.config import Recipe
from bd3_scale.data.open import Data
from bd3_scale.data.order import place_of
from bd3_scale.data.unigram import unigram_perplexity
from bd3_scale.diffusion import tuner
from bd3_scale.diffusion.objectives import Objective
from bd3_scale.errors import TrainingError
from bd3_scale.parallel.build import build_engine
from bd3_scale.parallel.layout import Layout
from bd3_scale.parallel.probe import probe_recipe
from bd3_scale.recipe_cures import as_yaml
from bd3_scale.runtime import resume
from bd3_scale.runtime.ema import ExponentialAverage
from bd3_scale.runtime.feed import Feed
from bd3_scale.runtime.garbage import collect, collected_on_demand
from bd3_scale.runtime.learning_rate import rate_of
from bd3_scale.runtime.owner import own
from bd3_scale.runtime.pace import Pace
from bd3_scale.runtime.pulse import Pulse
from bd3_scale.runtime.report import Reporter, flops_per_token
from bd3_scale.runtime.signals import StopRequest, seconds_left
from bd3_scale.runtime.validation import Validated, Validator

UNFINISHED = "unfinished_validation"
"""Entry of a checkpoint whose run was asked to stop during the validation of its step."""


class Trainer:
    """One run on one rank. `run()` returns when the budget is spent or all ranks agreed to stop."""

    def __init__(self, recipe: Recipe, layout: Layout, data: Data) -> None:
        self.recipe, self.layout, self.data = recipe, layout, data
        self.folder = Path(recipe.run.dir)
        self.step, self.samples = 0, 0
        self.total_steps = recipe.total_steps
        self.owner = own(self.folder, layout)
        found = resume.find(recipe, self.folder, data, layout)
        checkpoint = None if found is None else found.checkpoint
        vocabulary, mask_id = data.tokenizer.model_vocabulary_size, data.tokenizer.mask_id
        probed = probe_recipe(recipe, layout.device)
        self.engine = build_engine(recipe, layout, vocabulary, mask_id)
        decay = recipe.training.ema
        self.ema = ExponentialAverage(self.engine.masters, decay, self.engine.publish, self.engine.settle) if decay else None
        self.run_state: dict[str, Any] = resume.new_run_state(recipe, data)
        if found is not None and checkpoint is not None:
            checkpoint.load_into(self.engine.fragments(self._averages), layout)
            self.step, self.samples, self.run_state = checkpoint.step, checkpoint.samples_consumed, checkpoint.run
            rule = self.engine.adam.rule
            if "step_rule" in self.run_state:
                rule.load(self.run_state["step_rule"])
            self.engine.resume(checkpoint.step - rule.left_out_so_far)
            if found.amendments:
                self.run_state["amendments"] = found.amendments
        self.tuning = tuner.TunerState.from_dict(self.run_state["tuner"])
        self._advance(self.step)
        if found is not None and found.amended("objective.interval"):
            self._draw_from(recipe.objective.interval)
        if found is not None and found.amended("objective.resample"):
            rule.forget()
        self.feed = Feed(recipe, layout, data, self.objective_at, step=self.step, samples=self.samples)
        self.validator = Validator(
            data.validation,
            layout,
            rows=recipe.validation.rows,
            micro_batch=recipe.micro_batch(layout.data),
            seed=recipe.run.seed,
            interrupted=self._stop_in_validation,
        )
        self.stop = StopRequest(layout, seconds_left(recipe.run.time_limit))
        self.unigram = _unigram(data, recipe.validation.rows) if layout.leader else None
        may_write = self.owner.check
        flops = self.flops_per_token()
        self.report = Reporter(
            recipe, layout, self.folder, self.run_state, first_step=self.step, flops_per_token=flops, may_write=may_write
        )
        self.report.probed(probed)
        if found is not None:
            self.report.continued(self.step, found.amendments, found.remarks)
        for remark in filter(None, (shares.remark for shares in recipe.every_shares(layout.data))):
            self.report.say(remark)
        self.pulse = Pulse(self.folder if layout.leader else None, self.total_steps, layout.world_size, may_write=may_write)
        compiled = recipe.training.compile != "none"
        self.pace = Pace(layout, [part for net in self.engine.networks for part in ([net] if compiled else net.blocks.values())])
        self.validated: Validated | None = None
        checkpoints = self.folder / "checkpoints"
        self.saver = Saver(checkpoints, recipe.checkpoint, layout, say=self.report.say, warn=self.report.warning, may_write=may_write)
        if checkpoint is not None:
            self.saver.step, self.saver.published = checkpoint.step, checkpoint.path

    def run(self) -> Path:
        """Train to the end of the budget, or to an agreed stop; the state is saved either way. Returns the last checkpoint."""
        with collected_on_demand():
            self.train()
        self.close()
        assert self.saver.published is not None
        return self.saver.published

    def train(self) -> None:
        """The loop itself."""
        recipe = self.recipe
        if self.run_state.pop(UNFINISHED, False):
            self.validate()
            if self.step == self.total_steps:
                self.save()
        while self.step < self.total_steps and not self.stop.agreed():
            loss, norm = self.update()
            self.report.add(loss, norm)
            self.pulse.beat(self.step, "train")
            if self.due(recipe.tracking.every):
                self.log()
            if self.due(recipe.validation.every) or tuner.due(recipe.tuner, self.step):
                self.validate()
            if self.due(recipe.checkpoint.every):
                self.save()
        if self.saver.step != self.step:
            self.save()

    def due(self, every: int) -> bool:
        """Every so many steps (0: never), and after the last one."""
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    @property
    def objective(self) -> Objective:
        """The objective of the next update."""
        return self.objective_at(self.step)

    def objective_at(self, step: int) -> Objective:
        """The objective of update `step` as far as is known now: the block size of its stage, on the tuned interval. Changes nothing;
        the thread of the feed asks, too."""
        return self.recipe.objective_at(self.data.tokenizer, step, self._tuning_at(step).interval, self.layout.device.type)

    def _tuning_at(self, step: int) -> tuner.TunerState:
        block_size = self.recipe.objective_at(self.data.tokenizer, step).block_size
        return self.tuning.at(block_size, self.recipe.objective.interval)

    def _advance(self, step: int) -> None:
        """The run is at `step`, and what was tuned with it: another block size begins its search anew."""
        before, self.step, self.tuning = self.tuning.block_size, step, self._tuning_at(step)
        if self.tuning.block_size != before or self._batch_changes(step):
            self.engine.adam.rule.forget()  # norms of another loss, or of another noise

    def _batch_changes(self, step: int) -> bool:
        """Whether update `step` has another global batch than the one before it."""
        return any(phase.step == step for phase in self.recipe.batches.phases[1:])

    def _draw_from(self, interval: tuple[float, float]) -> None:
        if interval != self.tuning.interval:
            self.tuning = replace(self.tuning, interval=interval)
            self.engine.adam.rule.forget()

    def update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Returns (this rank's part of the train loss, gradient norm), on the device."""
        recipe = self.recipe
        start, self.pulse.waits = time.perf_counter(), True
        taken = self.feed.take(self.step, self.samples)
        self.pulse.waits = False
        self.pace.begin_step(time.perf_counter() - start)
        batch = recipe.batches.rows_at(self.step)
        loss = self.engine.forward_backward(taken.inputs, batch * taken.objective.scored_tokens_per_row)
        norm = self.engine.step(rate_of(recipe, self.step))
        before = self.tuning
        self._advance(self.step + 1)
        if self.tuning is not before or self._batch_changes(self.step):
            self.pulse.forget()
        self.samples += batch
        if self.ema is not None:
            self.ema.update(self.step)
        self.pace.end_step()
        return loss, norm

    def log(self) -> None:
        """Write a training line; too many steps left out in a row end the run."""
        self.saver.poll()
        collect()
        self.report.meter.flops_per_token = self.flops_per_token()  # block size and interval change during a run
        line = self.report.train(
            step=self.step,
            learning_rate=rate_of(self.recipe, self.step - 1),
            interval=list(self.tuning.interval),
            reduce=self.layout.sum_of_replicas,
            skipped=self.engine.adam.rule.counts,
            pace=self.pace.read,
        )
        in_a_row = line["skipped_in_a_row"]
        if in_a_row > self.recipe.training.skipped_in_a_row:
            raise TrainingError(self._diverged(in_a_row, line["loss"]))

    def _diverged(self, in_a_row: int, loss: float) -> str:
        """What was left out, and both ways on."""
        ranges, before = self.recipe.data.skip, self.recipe.batches.samples_before(self.step - in_a_row)
        first, last = (place_of(sample, ranges) for sample in (before, self.samples - 1))
        kept = [one for one in ranges if one[1] <= first or one[0] > last]  # others may lie among these samples
        skip, rate = as_yaml(sorted([*kept, [first, last + 1]])), self.recipe.training.learning_rate / 2
        return (
            f"the last {in_a_row} steps up to step {self.step} were left out, because their gradient norm was not a number or far above "
            f"those before (train loss {loss:.4g}); continue from the last checkpoint before them with a lower rate "
            f"(training.learning_rate={rate:.3g} run.amend=[training.learning_rate]), or without their rows (data.skip={skip} "
            "run.amend=[data.skip])"
        )

    def validate(self) -> None:
        """NELBO on the held-out rows, with the averaged weights where there are any; tune on the same pass when it is time."""
        start, config = time.perf_counter(), self.recipe.tuner
        self.pulse.beat(self.step, "validate")
        statistics = None
        with self.ema.swapped() if self.ema is not None else nullcontext():
            if tuner.due(config, self.step):
                resample = self.recipe.objective.resample
                validated, statistics = self.validator.and_tune(self.objective, self.engine.evaluate, resample=resample, rows=config.rows)
            else:
                validated = self.validator(self.objective, self.engine.evaluate)
        if validated is None:
            # Asked to stop: whoever continues the run makes this validation first, so that no line and no tuning is missing.
            self.run_state[UNFINISHED] = True
            return
        self.validated = validated
        seconds = time.perf_counter() - start
        self.report.validation(step=self.step, result=self.validated, seconds=seconds, unigram_perplexity=self.unigram)
        if statistics is not None:
            self.tune(statistics)

    def tune(self, statistics: tuner.IntervalStatistics) -> None:
        """Choose the interval on the leader, tell everybody, and make sure that everybody heard the same."""
        intervals, variances = statistics.intervals, statistics.variances
        choice = tuner.choose(intervals, variances, statistics.blocks, self.tuning.interval, self.recipe.tuner.margin)
        choice = self.layout.broadcast(choice)
        tuner.agreed(self.layout.all_gather(choice.interval))
        self._draw_from(choice.interval)
        self.tuning = self.tuning.after(self.step, choice)
        self.pulse.forget()
        self.report.tuner(step=self.step, choice=choice, intervals=intervals, variances=variances)

    def save(self) -> None:
        """Begin a checkpoint of this step; every rank writes its share, in the background (see `Saver`)."""
        self.pulse.beat(self.step, "save")
        copy_of = self.engine.copy_of if self.recipe.checkpoint.compare_replicas and self.layout.data > 1 else None
        seconds = self.saver.save(
            self.step,
            self.engine.owned_fragments(self._averages),
            samples_consumed=self.samples,
            run={**self.run_state, "tuner": self.tuning.to_dict(), "step_rule": self.engine.adam.rule.state()},
            recipe=recipes.to_yaml(self.recipe),
            replica=(copy_of, self.engine.weight_sum()) if copy_of is not None else None,
        )
        self.report.skip(seconds)

    def flops_per_token(self) -> float:
        return flops_per_token(self.recipe, self.objective.pattern, self.data.tokenizer.model_vocabulary_size, self.tuning.interval)

    def close(self) -> None:
        """Wait for the last checkpoint, end threads and files, let go of the state; the signals are the caller's again."""
        stopped = self.step < self.total_steps  # whoever asked for it waits at most 30 s
        self.saver.close(upload_seconds=10.0 if stopped else self.recipe.parallel.timeout / 2)
        self.feed.close()
        self.report.close()
        self.engine.close()
        self.pulse.beat(self.step, "stopped" if stopped else "finished")
        if self.layout.leader:
            self.owner.release()
        self.stop.close()  # last: a signal that came too late for the loop may end the process here

    def _stop_in_validation(self) -> bool:
        self.pulse.beat(self.step, "validate")
        return self.stop.agreed()

    @property
    def _averages(self) -> list[torch.Tensor] | None:
        return self.ema.tensors if self.ema is not None else None


def _unigram(data: Data, rows: int) -> float | None:
    """Perplexity of a unigram model on the validation rows: what a model must beat. Counted over small sets only."""
    if data.train_tokens > 20_000_000:
        return None
    held_out = data.validation.rows(np.arange(min(rows, len(data.validation))))
    return unigram_perplexity(data.train.rows(np.arange(len(data.train))), held_out, data.tokenizer.model_vocabulary_size)
