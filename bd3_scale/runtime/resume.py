"""What a run directory says before training starts: continue, refuse, or begin.

Invariants: nothing is overwritten by a run that is refused; every rank comes to the same answer or the same error; a
continued run has the recipe of the run it continues in everything that defines it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bd3_scale import config as recipes
from bd3_scale.checkpoint.fetch import fetch_latest
from bd3_scale.checkpoint.network import read_recipe
from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.checkpoint.store import find_latest
from bd3_scale.config import Recipe
from bd3_scale.data.open import Data
from bd3_scale.diffusion.config import block_sizes
from bd3_scale.diffusion.tuner import TunerState
from bd3_scale.errors import CheckpointError, RecipeError, UserError
from bd3_scale.parallel.layout import Layout
from bd3_scale.runtime.pulse import Pulse
from bd3_scale.runtime.waiting import Waiting


def find(recipe: Recipe, folder: Path, data: Data, layout: Layout) -> Checkpoint | None:
    """The verified checkpoint to continue from, or None for a new run. Raises RecipeError or CheckpointError on all ranks."""
    answer: tuple[str | None, UserError | None] = (None, None)
    if layout.leader:
        try:
            path = _decide(recipe, folder)
            answer = (str(path) if path else None, None)
        except UserError as error:
            answer = (None, error)
    name, failure = layout.broadcast(answer)
    if failure is not None:
        raise failure
    if name is None and recipe.run.resume == "auto" and recipe.checkpoint.remote is not None:
        name = _fetched(recipe, folder, layout)
    if name is None:
        return None
    checkpoint = Checkpoint(name)
    checkpoint.verify_files(communicator=layout)
    recipes.compare(read_recipe(checkpoint), recipe, checkpoint.step)
    _check_data(checkpoint.run, data)
    return checkpoint


def new_run_state(recipe: Recipe, data: Data) -> dict[str, Any]:
    """The free-form part of a checkpoint: what training decided, and what it was trained on."""
    beta, omega = recipe.objective.interval
    return {
        "tuner": TunerState(block_sizes(recipe.objective.block_size)[0][1], (beta, omega)).to_dict(),
        "tokenizer": {"name": data.tokenizer.name, "fingerprint": data.tokenizer.fingerprint},
        "data": {"fingerprint": data.fingerprint},
        "wandb": None,
    }


def _decide(recipe: Recipe, folder: Path) -> Path | None:
    latest = find_latest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    if recipe.run.resume == "never" and latest is not None:
        raise RecipeError(
            f"run.resume is never, but {folder} holds {latest.name}; set run.resume=auto to continue it or run.dir to another folder"
        )
    if recipe.run.resume == "fresh" and folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"run.resume is fresh, but {folder} is not empty; set run.dir to a new folder or empty it yourself")
    return latest


def _fetched(recipe: Recipe, folder: Path, layout: Layout) -> str | None:
    """A new cluster goes on with what the old one uploaded; a watcher sees that the run lives meanwhile."""
    pulse, waiting = Pulse(folder if layout.leader else None, recipe.total_steps, layout.world_size), Waiting(speaks=layout.leader)

    def beat(done: int, total: int) -> None:
        pulse.beat(0, "fetch")
        waiting.look(lambda: f"{done / 1e9:.1f} of {total / 1e9:.1f} GB of the checkpoint are here, from {recipe.checkpoint.remote}")

    assert recipe.checkpoint.remote is not None
    path = fetch_latest(recipe.checkpoint.remote, folder / "checkpoints", layout, beat)
    return None if path is None else str(path)


def _check_data(run: dict[str, Any], data: Data) -> None:
    saved = run.get("data", {}).get("fingerprint")
    if saved != data.fingerprint:
        raise CheckpointError(
            f"the checkpoint was trained on other data (fingerprint {str(saved)[:12]}) than {data.folder} holds "
            f"({data.fingerprint[:12]}), and continuing would repeat and skip rows; set data.path to the data it was trained on"
        )
