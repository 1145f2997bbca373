"""The last checkpoints of a run as one: the mean of their weights (LAWA; Kaddour 2022), to sample, evaluate and export.

Invariants: only checkpoints of one network and tokenizer are averaged; sums are in fp64, one tensor at a time; what is not
averaged (tuned interval, recipe) is that of the newest; what exists is never overwritten.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint import store
from bd3_scale.checkpoint.reader import Checkpoint, step_folders
from bd3_scale.convert.key_map import LazyFragment
from bd3_scale.convert.write import require_new
from bd3_scale.errors import CheckpointError, RecipeError
from bd3_scale.generation.load_model import read_recipe

WEIGHINGS: dict[str, Callable[[int], int]] = {"uniform": lambda step: 1, "step": lambda step: step}
"""How much a checkpoint of a step counts."""
KINDS = ("weight", "ema")


@dataclass(frozen=True)
class Averaged:
    checkpoint: Path
    steps: tuple[int, ...]
    """Of the checkpoints that it is the mean of, oldest first."""


def average(path: str | Path, out: Path, *, last: int, by: str = "uniform", weights: str = "weight") -> Averaged:
    """Make `out`/checkpoints/STEP of the `last` checkpoints of the run `path`, up to its latest. `by`: uniform | step (a checkpoint
    counts as its step). `weights`: weight, the trained ones, or ema, which are averages already. Raises UserError."""
    if last < 1 or by not in WEIGHINGS or weights not in KINDS:
        raise RecipeError(
            f"--last is {last}, --by {by!r}, --weights {weights!r}; set --last 1 or more, --by uniform | step, --weights weight | ema"
        )
    require_new(out)
    newest = Checkpoint(store.locate(path))
    found = [newest]
    for folder in step_folders(newest.path.parent):
        if len(found) < last and int(folder.name.removeprefix("step_")) < newest.step:
            found.append(Checkpoint(folder, offer=False))
    if len(found) < last:
        raise CheckpointError(
            f"{newest.path.parent} holds {len(found)} checkpoints up to step {newest.step}; set --last {len(found)} or fewer"
        )
    found.reverse()
    for one in found:
        _require_alike(one, newest, weights)
    counts = [WEIGHINGS[by](one.step) for one in found]
    if not sum(counts):
        raise CheckpointError(f"{newest.path} is of step 0, which counts nothing by step; set --by uniform")
    shapes = newest.shapes(weights)
    fragments = [LazyFragment("weight", name, shapes[name], _maker(found, counts, weights, name)) for name in shapes]
    steps = tuple(one.step for one in found)
    run = {
        **newest.run,
        "converted": {"from": f"the mean by {by} of the {weights}s of steps {list(steps)}", "source": str(newest.path.parent)},
    }
    recipe = recipes.to_yaml(read_recipe(newest))
    try:
        written = store.save(out / "checkpoints", newest.step, fragments, samples_consumed=newest.samples_consumed, run=run, recipe=recipe)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # it was empty or not there: the same command can be given again
        raise
    return Averaged(written, steps)


def _require_alike(one: Checkpoint, newest: Checkpoint, kind: str) -> None:
    if kind not in one.kinds:
        raise CheckpointError(f"checkpoint {one.path} has no {kind}, only {', '.join(one.kinds)}; set --weights {one.kinds[0]}")
    tokenizers = [each.run.get("tokenizer", {}).get("fingerprint") for each in (one, newest)]
    if read_recipe(one).model != read_recipe(newest).model or one.shapes(kind) != newest.shapes(kind) or len(set(tokenizers)) > 1:
        raise CheckpointError(f"checkpoints {one.path} and {newest.path} are of different networks or tokenizers; set a smaller --last")


def _maker(found: Sequence[Checkpoint], counts: Sequence[int], kind: str, name: str) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        total = torch.zeros(tuple(found[0].shapes(kind)[name]), dtype=torch.float64)
        for one, count in zip(found, counts, strict=True):
            total.add_(one.read(kind, name), alpha=count)
        return total.div_(sum(counts)).float()

    return make
