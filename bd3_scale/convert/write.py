"""From a source and a table of names to one of our checkpoints, and the recipe that goes on from it.

With a data folder the checkpoint is that of a run at step 0 (weights, averages equal to them, states of zero), so that
`python -m bd3_scale.train OUT/recipe.yaml` simply continues it; without one it holds the weights, for sampling, evaluation
and export. Invariants: tensors are made when they are written; nothing is written before recipe, tokenizer, data and names
were checked; what exists is never overwritten.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint import store
from bd3_scale.convert.key_map import KeyMap, LazyFragment, Sizes, makers
from bd3_scale.convert.source import Source
from bd3_scale.costs.parameter_shapes import parameter_shapes
from bd3_scale.data.manifest import MANIFEST, Manifest
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.data.tokenizer_files import keep_what_is_told
from bd3_scale.errors import CheckpointError, RecipeError
from bd3_scale.files import expanded
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.definition import free_keys
from bd3_scale.recipe.schema import DataConfig
from bd3_scale.rules.validate import validate
from bd3_scale.tuning.interval_tuner import TunerState

STEPS = 10_000
"""training.steps of the recipe where no budget is asked for."""
FREE = {"context", "dropout", "initial_std", *free_keys("model")}
"""Keys of `model` that are not part of the weights."""
RAISED = {"rotary_base"}
"""Those that may become larger: waves that are longer than those that the weights know, for rows that are."""


@dataclass(frozen=True)
class Import:
    """All that a format says about a source. `recipe`: a whole recipe where the source has one, else the defaults with `objective`."""

    source: Source
    key_map: KeyMap
    recipe: Recipe
    longest: int | None
    """Tokens of a row that the weights can do (learned positions, a sliding window); None: any number."""
    origin: str
    tuner: dict[str, Any] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """What whoever goes on from it should know."""


@dataclass(frozen=True)
class Written:
    checkpoint: Path
    recipe_file: Path
    recipe: Recipe
    trainable: bool


def require_new(out: Path) -> None:
    """Raises CheckpointError unless `out` is not there, or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; name a new folder")


def under(found: Import, recipe: str, block_size: int | None = None) -> Import:
    """The same source with all of the recipe of this path or name that is not its network; of the network, what may be raised (`RAISED`).
    `block_size`: what was asked for beside it. Raises RecipeError.
    """
    asked, own = recipes.load(recipe), found.recipe
    if asked.objective.kind != own.objective.kind:
        raise RecipeError(
            f"objective.kind of {recipe} is {asked.objective.kind}, but what is imported goes on as {own.objective.kind}; "
            f"give --objective {asked.objective.kind}, or another --recipe"
        )
    objective = replace(asked.objective, block_size=own.objective.block_size) if block_size is not None else asked.objective
    taken = {name: value for name, value in asdict(asked.model).items() if name in FREE}
    for name in RAISED:
        value, default = getattr(asked.model, name), getattr(Recipe().model, name)
        taken |= {name: value} if value != default and value > getattr(own.model, name) else {}
    network = replace(own.model, **taken)
    return replace(found, recipe=replace(asked, model=network, objective=objective))


def write(found: Import, out: Path, *, tokenizer: str, data: str | None, overrides: Sequence[str] = ()) -> Written:
    """Make `out`/checkpoints/step_00000000 and `out`/recipe.yaml. Raises UserError before anything is written, or CheckpointError."""
    require_new(out)
    text = load_tokenizer(tokenizer)
    recipe = _recipe(found, out, _kept_tokenizer(tokenizer, out), data, overrides)
    fingerprint = _fingerprint(recipe.data, recipe.model.context, text) if data is not None else None
    shapes = {name: one.shape for name, one in parameter_shapes(recipe.model, text.model_vocabulary_size).items()}
    sizes = Sizes(text.vocabulary_size, text.words, text.end_of_text, recipe.model.context, recipe.model.head_size, shapes)
    made = makers(found.source, found.key_map, recipe.model.layers, sizes)
    states = recipe.training.states
    kept = {name: ["weight"] for name in shapes}
    if fingerprint is not None:
        kept = {name: ["weight", *states.of(name), *(["ema"] if recipe.training.ema else [])] for name in shapes}
    fragments = [LazyFragment(kind, name, shapes[name], _maker(kind, shapes[name], made[name])) for name in shapes for kind in kept[name]]
    run = _run_state(found, recipe, text, fingerprint)
    written = recipes.to_yaml(recipe)
    out.mkdir(parents=True, exist_ok=True)
    try:
        if recipe.data.tokenizer != tokenizer:
            shutil.copyfile(expanded(tokenizer), recipe.data.tokenizer)
            keep_what_is_told(text, out)
        checkpoint = store.save(out / "checkpoints", 0, fragments, samples_consumed=0, run=run, recipe=written)
        (out / "recipe.yaml").write_text(written, "utf-8")
    except BaseException:
        # The folder was empty or not there: the same command can be given again.
        shutil.rmtree(out)
        raise
    return Written(checkpoint, out / "recipe.yaml", recipe, fingerprint is not None)


def _maker(kind: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return make if kind in ("weight", "ema") else lambda: torch.zeros(shape)


def _kept_tokenizer(tokenizer: str, out: Path) -> str:
    """Where the recipe finds its tokenizer: a file is kept beside the checkpoint."""
    return tokenizer if tokenizer in ("gpt2", "bytes") else str(out.absolute() / "tokenizer.json")


def _recipe(found: Import, out: Path, tokenizer: str, data: str | None, overrides: Sequence[str]) -> Recipe:
    recipe, folder = found.recipe, str(out.absolute())
    run = replace(recipe.run, name=out.name, dir=folder)
    section = replace(recipe.data, tokenizer=tokenizer)
    if data:
        section = replace(section, path=str(expanded(data).absolute()))
    training = recipe.training
    if training.steps is None and training.tokens is None:
        training = replace(training, steps=STEPS)
    if any(item.startswith(("training.tokens=", "training.steps=")) for item in overrides):
        training = replace(training, steps=None, tokens=None)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "recipe.yaml"
        file.write_text(recipes.to_yaml(replace(recipe, run=run, data=section, training=training)), "utf-8")
        asked = recipes.load(file, list(overrides))
    before, after = asdict(recipe.model), asdict(asked.model)
    for key, value in after.items():
        if key in FREE or value == before[key] or (key in RAISED and value > before[key]):
            continue
        more = ", or set more, for longer rows" if key in RAISED else ""
        raise RecipeError(f"model.{key} is {value}, but the weights have {before[key]}; leave model.{key} out{more}")
    if found.longest is not None and asked.model.context > found.longest:
        raise RecipeError(f"model.context is {asked.model.context}, but the weights do rows of {found.longest} tokens; set at most that")
    if data and asked.data.path != section.path:
        raise RecipeError(f"data.path is {asked.data.path}, but --data names {data}; name one of the two")
    layout = asked.parallel
    validate(asked, layout.tensor * layout.context * layout.pipeline * (layout.shard or 1))
    return asked


def _fingerprint(data: DataConfig, context: int, tokenizer: Tokenizer) -> str:
    """Of the data that is trained on, checked to fit the recipe."""
    folder = Path(data.path)
    manifest = Manifest.load(folder / MANIFEST)
    manifest.require(folder, context=context, tokenizer=tokenizer)
    manifest.require_preparation(folder, format=data.format, row_special=data.row_special)
    return manifest.fingerprint


def _run_state(found: Import, recipe: Recipe, tokenizer: Tokenizer, data: str | None) -> dict[str, Any]:
    state = TunerState.begin(recipe.objective)
    if found.tuner and recipe.objective == found.recipe.objective:
        state = TunerState.from_dict(found.tuner)
    return {
        "wandb": None,
        **found.run,
        "tuner": state.to_dict(),
        "tokenizer": {"name": recipe.data.tokenizer, "fingerprint": tokenizer.fingerprint},
        "data": {"fingerprint": data},
        "converted": {"from": found.origin, "source": str(found.source.path)},
    }
