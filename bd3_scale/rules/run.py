"""The rules for how a run goes in time: the learning rate's schedule, samples left out, changes of a run that is continued.

As `across_keys.py`, which asks them; none of these depends on the layout.
"""

from __future__ import annotations

import importlib.util
import re
from itertools import pairwise

from bd3_scale.recipe.definition import KEYS
from bd3_scale.recipe.objective_kinds import block_sizes
from bd3_scale.recipe.schema import TrainingConfig
from bd3_scale.recipe.text import as_text, as_yaml
from bd3_scale.rules.suggestions import Case, Problem


def decay_has_its_schedule(case: Case) -> Problem | None:
    training = case.recipe.training
    decay, room = training.decay, case.recipe.total_steps - training.warmup
    if training.learning_rate_schedule != "wsd":
        if decay == 0:
            return None
        text = f"training.decay = {decay} is for wsd, but training.learning_rate_schedule = {training.learning_rate_schedule}"
        return Problem(text, lambda: ["set training.decay=0", "set training.learning_rate_schedule=wsd"])
    if 0 < decay <= room:
        return None
    text = f"training.decay = {decay} must lie between 1 and training.steps - training.warmup = {room} because wsd decays in the last steps"
    return Problem(text, lambda: [as_text({"training.decay": max(1, room // 5)}) if room > 0 else as_text({"training.warmup": 0})])


def rewarmup_has_its_change(case: Case) -> Problem | None:
    steps = case.recipe.training.rewarmup
    if steps == 0 or len(block_sizes(case.recipe.objective.block_size)) > 1:
        return None
    text = f"training.rewarmup = {steps} follows a change of objective.block_size, which never changes"
    return Problem(text, lambda: ["set training.rewarmup=0"])


def momentum_has_its_optimizer(case: Case) -> Problem | None:
    training, default = case.recipe.training, TrainingConfig().momentum
    if training.states.whole_matrices or training.momentum == default:
        return None
    text = f"training.momentum = {training.momentum} is muon's, but training.optimizer = {training.optimizer} has training.betas"
    return Problem(text, lambda: [f"set training.momentum={default}", "set training.optimizer=muon"])


def set_names_are_plain(case: Case) -> Problem | None:
    """They name plots and keys of wandb."""
    wrong = [name for name in case.recipe.validation.sets if not re.fullmatch(r"[A-Za-z0-9_.-]+", name)]
    if not wrong:
        return None
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", wrong[0]) or "other"
    return Problem(f"validation.sets has the name {wrong[0]!r}, which must be letters, digits, _ . -", lambda: [f"call it {plain}"])


def skipped_ranges_ascend(case: Case) -> Problem | None:
    ranges = case.recipe.data.skip
    pairs = all(isinstance(one, (list, tuple)) and len(one) == 2 and all(type(place) is int for place in one) for one in ranges)
    if pairs and all(0 <= first < stop for first, stop in ranges) and all(a[1] <= b[0] for a, b in pairwise(ranges)):
        return None
    text = f"data.skip is {as_yaml(ranges)} but must be ranges [from, to] of samples, in ascending order and apart"
    return Problem(text, lambda: ["set data.skip=[], or data.skip=[[51200,56320]], for example"])


def amended_keys_may_be(case: Case) -> Problem | None:
    amendable = sorted(key for key, facts in KEYS.items() if facts.change == "amend")
    wrong = next((key for key in case.recipe.run.amend if key not in amendable), None)
    if wrong is None:
        return None
    text = f"run.amend has {wrong!r}, which no continued run can change"
    return Problem(text, lambda: [f"use some of {', '.join(amendable)}"])


def tensorboard_is_installed(case: Case) -> Problem | None:
    if not case.recipe.tracking.tensorboard or importlib.util.find_spec("tensorboard") is not None:
        return None
    text = "tracking.tensorboard is true, but the package tensorboard is not installed here"
    return Problem(text, lambda: ["set tracking.tensorboard=false", "pip install 'bd3_scale[tensorboard]'"])


def profiled_steps_ascend(case: Case) -> Problem | None:
    steps = case.recipe.tracking.profile
    if not steps or (len(steps) == 2 and 0 <= steps[0] <= steps[1]):
        return None
    return Problem(
        f"tracking.profile is {steps} but must be [first step, last step]", lambda: ["set tracking.profile=[20,25], for example"]
    )


RUN_RULES = (
    set_names_are_plain,
    decay_has_its_schedule,
    rewarmup_has_its_change,
    momentum_has_its_optimizer,
    skipped_ranges_ascend,
    amended_keys_may_be,
    tensorboard_is_installed,
    profiled_steps_ascend,
)
