"""What a run directory says before training starts: continue, refuse, or begin.

Invariants: nothing is overwritten by a run that is refused; every rank comes to the same answer or the same error; a
continued run has the recipe of the run it continues in everything that defines it, but for what `run.amend` names: such a change is in
force from this checkpoint's step on, is part of what the run is for whoever continues it, and never touches what was trained before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint.reader import Checkpoint, newest_whole
from bd3_scale.checkpoint.store import find_latest, step_of_latest
from bd3_scale.data.open import Data
from bd3_scale.data.order import place_of
from bd3_scale.distributed.layout import Layout
from bd3_scale.distributed.waiting import Waiting
from bd3_scale.errors import CheckpointError, RecipeError, UserError, on_all_ranks, without_credentials
from bd3_scale.fault_tolerance.heartbeat_file import HeartbeatFile
from bd3_scale.fault_tolerance.run_owner import FOLDER as OWNER
from bd3_scale.generation.load_model import read_recipe
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.text import as_yaml
from bd3_scale.saving.fetch import fetch_latest
from bd3_scale.training.run_state import RunState
from bd3_scale.training.schedules import rate_of


@dataclass(frozen=True)
class Found:
    """A checkpoint to continue from, verified."""

    checkpoint: Checkpoint
    amendments: list[dict[str, Any]]
    """All of the run so far, in order, those of this start last: {step, key, before, now}."""
    remarks: list[str]
    """What a person should know of this start."""

    @property
    def state(self) -> RunState:
        """What the run goes on with."""
        return replace(RunState.from_dictionary(self.checkpoint.run), amendments=self.amendments)

    def amended(self, key: str) -> bool:
        """Whether this start changes `key`."""
        return any(one["key"] == key and one["step"] == self.checkpoint.step for one in self.amendments)


def find(recipe: Recipe, folder: Path, data: Data, layout: Layout) -> Found | None:
    """What to continue from, or None for a new run. Raises the same RecipeError or CheckpointError on all ranks."""
    remarks: list[str] = []
    with on_all_ranks():
        path = _on_leader(layout, lambda: _decide(recipe.run.resume, recipe.checkpoint.fallback, folder, remarks))
        if path is None and recipe.run.resume == "auto" and recipe.checkpoint.remote is not None:
            path = _fetched(recipe.checkpoint.remote, recipe.total_steps, folder, layout)
    while path is not None:
        checkpoint = Checkpoint(path)  # which may fail on one rank alone
        with on_all_ranks():
            try:
                checkpoint.verify_files(communicator=layout)
            except CheckpointError as error:
                older = _on_leader(layout, partial(newest_whole, path.parent, checkpoint.step))
                if older is None or not recipe.checkpoint.fallback:
                    raise
                remarks.append(_fallen_back(error, older))
                path = older
            else:
                return _compare(checkpoint, recipe, data, remarks)
    return None


def _on_leader(layout: Layout, action: Callable[[], Path | None]) -> Path | None:
    """What the leader finds, or its error, on all ranks."""
    answer: tuple[Path | None, UserError | None] = (None, None)
    if layout.is_main_rank:
        try:
            answer = (action(), None)
        except UserError as error:
            answer = (None, error)
    path, failure = layout.broadcast(answer)
    if failure is not None:
        raise failure
    return path


def _compare(checkpoint: Checkpoint, recipe: Recipe, data: Data, remarks: list[str]) -> Found:
    """Whether the recipe continues this run, and with which changes."""
    saved, step, run = read_recipe(checkpoint), checkpoint.step, checkpoint.run
    earlier = run.get("amendments", [])
    changes = recipes.compare(saved, recipe, step, {one["key"]: one["step"] for one in earlier})
    _check_data(run, data)
    if "data.skip" in changes and checkpoint.samples_consumed > 0:
        _check_skip(*changes["data.skip"], consumed=place_of(checkpoint.samples_consumed - 1, saved.data.skip) + 1)
    made = [{"step": step, "key": key, "before": before, "now": now} for key, (before, now) in changes.items()]
    budget = replace(saved.training, steps=recipe.total_steps, tokens=None, decay=recipe.training.decay)
    before, now = rate_of(saved, step), rate_of(replace(saved, training=budget), step)
    if abs(now - before) > 1e-6 * before and step < recipe.total_steps:
        remarks.append(
            f"the learning rate of step {step} jumps from {before:.3g} to {now:.3g}: "
            f"training.learning_rate_schedule={saved.training.learning_rate_schedule} is another curve "
            f"over {recipe.total_steps} steps than over {saved.total_steps}"
        )
    return Found(checkpoint, [*earlier, *made], remarks)


def _check_skip(before: list[list[int]], now: list[list[int]], consumed: int) -> None:
    """Refuse ranges that would move samples that were trained on: they may only be of the future."""
    past, asked = ([list(one) for one in ranges if one[0] < consumed] for ranges in (before, now))
    if past != asked:
        future = [[max(first, consumed), stop] for first, stop in now if stop > consumed and [first, stop] not in past]
        raise RecipeError(
            f"data.skip is {as_yaml(now)}, but the checkpoint has gone through the samples up to {consumed}; set "
            f"data.skip={as_yaml([*past, *future])}, or continue from an earlier checkpoint (write its name into checkpoints/latest)"
        )


def _decide(resume: str, fallback: bool, folder: Path, remarks: list[str]) -> Path | None:
    checkpoints = folder / "checkpoints"
    latest = None
    if checkpoints.is_dir():
        try:
            latest = find_latest(checkpoints)
        except CheckpointError as error:
            latest = newest_whole(checkpoints, below=step_of_latest(checkpoints)) if fallback else None
            if latest is None:
                raise
            remarks.append(_fallen_back(error, latest))
    if resume == "never" and latest is not None:
        raise RecipeError(
            f"run.resume is never, but {folder} holds {latest.name}; set run.resume=auto to continue it or run.dir to another folder"
        )
    if resume == "fresh" and folder.exists() and any(path.name != OWNER for path in folder.iterdir()):
        raise RecipeError(f"run.resume is fresh, but {folder} is not empty; set run.dir to a new folder or empty it yourself")
    return latest


def _fallen_back(error: CheckpointError, older: Path) -> str:
    return f"checkpoint.fallback: continuing from {older.name}, because {str(error).split('; the newest older')[0]}"


def _fetched(remote: str, total_steps: int, folder: Path, layout: Layout) -> Path | None:
    """A new cluster goes on with what the old one uploaded; a watcher sees that the run lives meanwhile."""
    heartbeat = HeartbeatFile(folder if layout.is_main_rank else None, total_steps, layout.world_size)
    waiting = Waiting(speaks=layout.is_main_rank)
    shown = without_credentials(remote)

    def beat(done: int, total: int) -> None:
        heartbeat.beat(0, "fetch")
        waiting.look(lambda: f"{done / 1e9:.1f} of {total / 1e9:.1f} GB of the checkpoint are here, from {shown}")

    return fetch_latest(remote, folder / "checkpoints", layout, beat)


def _check_data(run: dict[str, Any], data: Data) -> None:
    trained, here = run.get("tokenizer", {}).get("fingerprint"), data.tokenizer.fingerprint
    if trained is not None and trained != here:
        raise CheckpointError(
            f"the checkpoint was trained with another tokenizer (fingerprint {str(trained)[:12]}) than "
            f"data.tokenizer={data.tokenizer.name} is ({here[:12]}); set data.tokenizer to where that one lies"
        )
    saved = run.get("data", {}).get("fingerprint")
    if saved != data.fingerprint:
        raise CheckpointError(
            f"the checkpoint was trained on other data (fingerprint {str(saved)[:12]}) than {data.folder} holds "
            f"({data.fingerprint[:12]}), and continuing would repeat and skip rows; set data.path to the data it was trained on"
        )
