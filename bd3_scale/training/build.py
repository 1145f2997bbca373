"""The parts of a run on one rank, made in one place and handed to the `Trainer`: what is restored of a checkpoint is restored here.

Invariants: all ranks make them in the same order, since many talk to their peers meanwhile; signals are listened to only after what may
take long (data, weights, rows) is there; nothing is written into a run directory that this job does not own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bd3_scale.data.open import Data, open_held_out
from bd3_scale.distributed.layout import Layout
from bd3_scale.engines.build import build_engine
from bd3_scale.engines.engine import Engine
from bd3_scale.engines.kernel_probe import probe_recipe
from bd3_scale.fault_tolerance.heartbeat_file import HeartbeatFile
from bd3_scale.fault_tolerance.pace import Pace
from bd3_scale.fault_tolerance.run_owner import Owner, own
from bd3_scale.fault_tolerance.stop_request import StopRequest, seconds_left
from bd3_scale.objectives.table import selected_multiple
from bd3_scale.optimizers.ema import ExponentialAverage
from bd3_scale.recipe import Recipe
from bd3_scale.reporting.reporter import Reporter
from bd3_scale.saving.background import Saver
from bd3_scale.training import resume
from bd3_scale.training.feed import Feed
from bd3_scale.training.profiler import StepProfiler
from bd3_scale.training.run_state import RunState
from bd3_scale.training.schedules import TunedObjective
from bd3_scale.training.validation import Validator
from bd3_scale.tuning.estimates import unigram_perplexity


@dataclass(frozen=True)
class Parts:
    """What a `Trainer` drives, and where the run is: `step` updates were made, of `samples` rows."""

    recipe: Recipe
    layout: Layout
    vocabulary: int
    """Of the model: with the mask, without padding."""
    step: int
    samples: int
    state: RunState
    owner: Owner
    engine: Engine
    ema: ExponentialAverage | None
    objectives: TunedObjective
    feed: Feed
    validator: Validator
    set_validators: Mapping[str, Validator]
    """Of `validation.sets`, by name."""
    unigram: float | None
    """Perplexity that a model must beat; see `_unigram`."""
    stop: StopRequest
    profiler: StepProfiler
    report: Reporter
    heartbeat: HeartbeatFile
    pace: Pace
    saver: Saver


def build_parts(recipe: Recipe, layout: Layout, data: Data) -> Parts:
    """Of a new run, or of one that is continued; collective. Raises UserError of many kinds where the run may not or cannot start."""
    folder = Path(recipe.run.dir)
    owner = own(folder, layout)
    validation: dict[str, Any] = {
        "rows": recipe.validation.rows,
        "micro_batch": recipe.micro_batch(layout.data),
        "seed": recipe.run.seed,
        "pad_to": selected_multiple(recipe.parallel, layout.device.type),
        "ring": recipe.parallel.context_exchange == "ring",
    }
    validator = Validator(data.validation, layout, **validation)
    set_validators = {}
    for name, path in recipe.validation.sets.items():
        with open_held_out(name, path, recipe.data, recipe.model.context, data.tokenizer) as rows:
            set_validators[name] = Validator(rows, layout, **validation, name=name)
    found = resume.find(recipe, folder, data, layout)
    probed = probe_recipe(recipe, layout.device)
    vocabulary = data.tokenizer.model_vocabulary_size
    engine = build_engine(recipe, layout, vocabulary, data.tokenizer.mask_id)
    decay = recipe.training.ema
    ema = ExponentialAverage(engine.masters, decay, engine.publish, engine.settle) if decay else None
    step, samples, state = 0, 0, RunState.begin(recipe.objective, data)
    if found is not None:
        step, samples, state = found.checkpoint.step, found.checkpoint.samples_consumed, found.state
        found.checkpoint.load_into(engine.fragments(ema.tensors if ema is not None else None), layout)
        engine.resume(step, state.step_rule)
    objectives = TunedObjective(recipe, data.tokenizer, layout.device.type, state.tuner)
    _amend(objectives, step, found, forget=engine.adam.rule.forget)
    feed = Feed(recipe, layout, data, objectives.at, step=step, samples=samples)
    stop = StopRequest(layout, seconds_left(recipe.run.time_limit))
    unigram = _unigram(data, recipe.validation.rows) if layout.is_main_rank else None
    report = Reporter(recipe, layout, folder, first_step=step, wandb=state.wandb, may_write=owner.check)
    report.probed(probed)
    if found is not None:
        report.continued(step, found.amendments, found.remarks)
    for remark in filter(None, (shares.remark for shares in recipe.every_shares(layout.data))):
        report.say(remark)
    heartbeat = HeartbeatFile(folder if layout.is_main_rank else None, recipe.total_steps, layout.world_size, may_write=owner.check)
    whole = recipe.training.compile != "none"
    pace = Pace(layout, [part for net in engine.networks for part in ([net] if whole else net.blocks.values())])
    saver = Saver(
        folder / "checkpoints",
        recipe.checkpoint,
        layout,
        say=report.say,
        warn=report.warning,
        may_write=owner.check,
        continued=None if found is None else (step, found.checkpoint.path),
    )
    return Parts(
        recipe=recipe,
        layout=layout,
        vocabulary=vocabulary,
        step=step,
        samples=samples,
        state=replace(state, wandb=report.wandb),
        owner=owner,
        engine=engine,
        ema=ema,
        objectives=objectives,
        feed=feed,
        validator=validator,
        set_validators=set_validators,
        unigram=unigram,
        stop=stop,
        profiler=StepProfiler(recipe.tracking, layout.rank, layout.device, folder / "profile"),
        report=report,
        heartbeat=heartbeat,
        pace=pace,
        saver=saver,
    )


def _amend(objectives: TunedObjective, step: int, found: resume.Found | None, forget: Callable[[], None]) -> None:
    """Train from `step` on what the recipe says of it now. `forget` the norms of another loss."""
    changes = objectives.advance(step) or objectives.recipe.batches.begins(step)
    changed = {name for name in ("interval", "density", "density_shape", "resample") if found and found.amended(f"objective.{name}")}
    objective = objectives.recipe.objective
    if changed - {"resample"} or ("resample" in changed and objective.resample):  # which goes with no density
        objectives.draw_from(objective.interval if "interval" in changed else None)
    if changes or changed:
        forget()


def _unigram(data: Data, rows: int) -> float | None:
    """Perplexity of a unigram model on the validation rows: what a model must beat. Counted over small sets only."""
    if data.train_tokens > 20_000_000:
        return None
    held_out = data.validation.rows(np.arange(min(rows, len(data.validation))))
    return unigram_perplexity(data.train.rows(np.arange(len(data.train))), held_out, data.tokenizer.model_vocabulary_size)
