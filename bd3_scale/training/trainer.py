"""The training run: take inputs, forward-backward, step, EMA, log, validate, tune, save, stop - and nothing else.

All state that a resume needs is (weights, moments, EMA, step, samples consumed, a small dictionary): none of it depends
on the number of ranks. Everything random is keyed by (seed, step, place in the global batch). Nothing waits for the
device between logging steps.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from bd3_scale import recipe as recipes
from bd3_scale.data.order import place_of
from bd3_scale.errors import TrainingError
from bd3_scale.recipe.text import as_yaml
from bd3_scale.reporting.reporter import flops_per_token
from bd3_scale.training.build import Parts
from bd3_scale.training.schedules import rate_of
from bd3_scale.tuning import interval_tuner
from bd3_scale.tuning.estimates import Validated


class Trainer:
    """One run on one rank. `run()` returns when the budget is spent or all ranks agreed to stop."""

    def __init__(self, parts: Parts) -> None:
        self.recipe, self.layout, self.state, self.vocabulary = parts.recipe, parts.layout, parts.state, parts.vocabulary
        self.engine, self.ema, self.objectives, self.feed = parts.engine, parts.ema, parts.objectives, parts.feed
        self.report, self.saver, self.heartbeat, self.pace = parts.report, parts.saver, parts.heartbeat, parts.pace
        self.validator, self.unigram, self.stop, self.owner = parts.validator, parts.unigram, parts.stop, parts.owner
        self.set_validators, self.profiler = parts.set_validators, parts.profiler
        self.batches = parts.recipe.batches  # read from the key once, not at every step
        self.step, self.samples, self.total_steps = parts.step, parts.samples, parts.recipe.total_steps
        self.validated: Validated | None = None

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
        if self.state.unfinished_validation:
            self.state = replace(self.state, unfinished_validation=False)
            self.validate()
            if self.step == self.total_steps:
                self.save()
        while self.step < self.total_steps and not self.stop.agreed():
            self.profiler.before(self.step)
            self.report.add(*self.update())
            self.heartbeat.beat(self.step, "train")
            if self.due(recipe.tracking.every):
                self.log()
            if self.due(recipe.validation.every) or interval_tuner.due(recipe.tuner, self.step):
                self.validate()
            if self.due(recipe.checkpoint.every):
                self.save()
        self.profiler.close()
        if self.saver.step != self.step:
            self.save()

    def due(self, every: int) -> bool:
        """Every so many steps (0: never), and after the last one."""
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    @property
    def tuning(self) -> interval_tuner.TunerState:
        return self.objectives.tuning

    def _advance(self, step: int) -> None:
        """The run is at `step`, and what was tuned with it: another block size begins its search anew."""
        self.step = step
        if self.objectives.advance(step) or self.batches.begins(step):
            self.engine.adam.rule.forget()  # norms of another loss, or of another noise
            self.heartbeat.forget()  # and steps of another length

    def update(self) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """One optimizer step. Returns (this rank's part of the train loss, gradient norm), on the device, the control of the former, and
        the share of the batch's tokens that count."""
        recipe = self.recipe
        start, self.heartbeat.waits = time.perf_counter(), True
        taken = self.feed.take(self.step, self.samples)
        self.heartbeat.waits = False
        waited = time.perf_counter() - start
        self.pace.begin_step(waited)
        self.report.took(waited, "waiting for data")
        batch = self.batches.rows_at(self.step)
        loss = self.engine.forward_backward(taken.inputs, taken.tokens)
        norm = self.engine.step(rate_of(recipe, self.step))
        self._advance(self.step + 1)
        self.samples += batch
        if self.ema is not None:
            self.ema.update(self.step)
        self.pace.end_step()
        return loss, norm, taken.control / taken.tokens, taken.rows_tokens / (batch * (recipe.model.context - 1))

    def log(self) -> None:
        """Write a training line; too many steps left out in a row end the run."""
        self.saver.poll()
        collect()
        line = self.report.train(
            step=self.step,
            learning_rate=rate_of(self.recipe, self.step - 1),
            intervals={tuning.block_size: list(tuning.interval) for _, _, tuning in self.objectives.in_use(self.step)},
            flops_per_token=self.flops_per_token(),  # block size and interval change during a run
            reduce=self.layout.sum_of_replicas,
            skipped=self.engine.adam.rule.counts,
            pace=self.pace.read,
        )
        in_a_row = line["skipped_in_a_row"]
        if in_a_row > self.recipe.training.skipped_in_a_row:
            raise TrainingError(self._diverged(in_a_row, line["loss"]))

    def _diverged(self, in_a_row: int, loss: float) -> str:
        """What was left out, and both ways on."""
        ranges, before = self.recipe.data.skip, self.batches.samples_before(self.step - in_a_row)
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
        """NELBO on the held-out rows and on those of other sets, with the averaged weights where there are any; tune on the pass over the
        former when it is time. Of a mixture of block sizes one pass with each."""
        start, config, resample = time.perf_counter(), self.recipe.tuner, self.recipe.objective.resample
        self.heartbeat.beat(self.step, "validate")
        results: dict[int, Validated] = {}
        sets: dict[str, dict[int, Validated]] = {name: {} for name in self.set_validators}
        statistics: dict[int, interval_tuner.IntervalStatistics] = {}
        with self.ema.swapped() if self.ema is not None else nullcontext():
            for _, objective, _ in self.objectives.in_use(self.step):
                given, size = (objective, self.engine.evaluate, self._stop_in_validation), objective.block_size
                passes = [(results, self.validator), *((sets[name], one) for name, one in self.set_validators.items())]
                for measured, validator in passes:
                    if validator is self.validator and interval_tuner.due(config, self.step):
                        validated, found = validator.and_tune(*given, resample=resample, rows=config.rows)
                        statistics |= {} if found is None else {size: found}
                    else:
                        validated = validator(*given)
                    if validated is None:
                        # Asked to stop: whoever continues the run makes this validation first, so that no line and no tuning is missing.
                        self.state = replace(self.state, unfinished_validation=True)
                        return
                    measured[size] = validated
        self.validated = next(iter(results.values()))
        seconds = time.perf_counter() - start
        self.report.validation(step=self.step, results=results, seconds=seconds, unigram_perplexity=self.unigram, sets=sets)
        for size, found in statistics.items():
            self.tune(found, size)

    def tune(self, statistics: interval_tuner.IntervalStatistics, block_size: int) -> None:
        """Choose interval and density on the leader, tell everybody, and make sure that everybody heard the same."""
        choice = self.layout.broadcast(self.objectives.choose(statistics, block_size))
        interval_tuner.agreed(self.layout.all_gather(choice.interval))
        if choice.density is not None:
            interval_tuner.agreed(self.layout.all_gather(choice.density.learned), "densities")
        if self.objectives.take(choice, self.step, block_size):
            self.engine.adam.rule.forget()
        self.heartbeat.forget()
        size = block_size if self.tuning.others else None
        self.report.tuner(step=self.step, choice=choice, intervals=statistics.intervals, variances=statistics.variances, block_size=size)

    def save(self) -> None:
        """Begin a checkpoint of this step; every rank writes its share, in the background (see `Saver`)."""
        self.heartbeat.beat(self.step, "save")
        state = replace(self.state, tuner=self.tuning, step_rule=self.engine.adam.rule.state())
        copy_of = self.engine.copy_of if self.recipe.checkpoint.compare_replicas and self.layout.states > 1 else None
        seconds = self.saver.save(
            self.step,
            self.engine.owned_fragments(self._averages),
            samples_consumed=self.samples,
            run=state.to_dictionary(),
            recipe=recipes.to_yaml(self.recipe),
            replica=(copy_of, self.engine.weight_sum()) if copy_of is not None else None,
        )
        self.report.skip(seconds, "checkpoints")

    def flops_per_token(self) -> float:
        parts = self.objectives.in_use(self.step)
        model, config = self.recipe.model, self.recipe.objective
        return sum(share * flops_per_token(model, config, one.pattern, self.vocabulary, tuning) for share, one, tuning in parts)

    def close(self) -> None:
        """Wait for the last checkpoint, end threads and files, let go of the state; the signals are the caller's again."""
        stopped = self.step < self.total_steps  # whoever asked for it waits at most 30 s
        self.saver.close(upload_seconds=10.0 if stopped else self.recipe.parallel.timeout / 2)
        self.feed.close()
        self.report.close()
        self.engine.close()
        self.heartbeat.beat(self.step, "stopped" if stopped else "finished")
        if self.layout.is_main_rank:
            self.owner.release()
        self.stop.close()  # last: a signal that came too late for the loop may end the process here

    def _stop_in_validation(self) -> bool:
        self.heartbeat.beat(self.step, "validate")
        return self.stop.agreed()

    @property
    def _averages(self) -> list[torch.Tensor] | None:
        return self.ema.tensors if self.ema is not None else None


@contextmanager
def collected_on_demand() -> Iterator[None]:
    """Inside, Python's garbage is collected by `collect` alone, on all ranks after the same steps; afterwards as before, however it ends.
    What exists at the beginning (imports, the model) is not looked at; what a caller froze stays frozen.

    By itself the collector runs at moments of its own on every rank; a pause of a tenth of a second on one of 64 ranks makes the other
    63 wait in their next collective, and nearly every step meets such a rank.
    """
    gc.collect()  # all of it is of the oldest generation now
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect() -> None:
    """The young objects: a few milliseconds."""
    gc.collect(1)
