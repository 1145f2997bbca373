"""What programs use of bd3_scale: load a recipe, train it, load what was trained, let it write, score texts.

    import bd3_scale

    recipe = bd3_scale.load_recipe("quickstart", "training.steps=100")
    model = bd3_scale.load_model(bd3_scale.train_recipe(recipe))
    print(bd3_scale.generate(model, ["The list"], length=64))
    print(bd3_scale.score(model, ["The list is sorted."]))

The names are those of `bd3_scale` itself, imported when they are used first. Everything that can be wrong with what is given raises
`bd3_scale.errors.UserError`, one line that says what to do. Under torchrun every rank calls the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint.store import locate
from bd3_scale.errors import RecipeError
from bd3_scale.evaluation.continuation import continuation_log_likelihood
from bd3_scale.generation.generate import generate_tokens
from bd3_scale.generation.load_model import LoadedNetwork, load_network
from bd3_scale.launcher import launched
from bd3_scale.recipe import Recipe
from bd3_scale.rules.validate import validate

load_model = load_network


def load_recipe(path: str | Path, *overrides: str) -> Recipe:
    """A recipe by its file, or by the name of one that is shipped, with `dotted.key=value` overrides; checked for as many processes as were
    started and for the device it would train on. Raises RecipeError."""
    recipe = recipes.load(path, list(overrides))
    validate(recipe, launched().world_size, recipes.resolve_device(recipe.run.device))
    return recipe


def train_recipe(recipe: Recipe) -> Path:
    """Train to the end of the budget, going on where the run's folder is. Returns the last checkpoint. Raises UserError."""
    from bd3_scale.train import run

    recipes.settle()
    run(recipe, recipes.resolve_device(recipe.run.device))
    return locate(recipe.run.dir)


def generate(model: LoadedNetwork, prompts: Sequence[str] = ("",), **options: Any) -> list[str]:
    """A text for each prompt, which it begins with; `options` are those of `generation.generate.generate_tokens` (length, seed, sampler,
    temperature ...). Raises RecipeError for options that cannot work, CheckpointError for a network that gives no numbers."""
    result = generate_tokens(model, prompts=prompts, **options)
    return [model.tokenizer.decode(tokens[1:].tolist()) for tokens in result.tokens]


def score(model: LoadedNetwork, texts: Sequence[str], *, draws: int = 8, seed: int = 0) -> list[float]:
    """log p of each text after a BOS, in nats: exact for ar and L' = 1, else a lower bound estimated with `draws` draws of the noise a
    block. Raises RecipeError for an objective without a likelihood and for a text that is longer than the training context."""
    scores = []
    for text in texts:
        tokens, most = model.tokenizer.encode(text), model.recipe.model.context - 1
        if not 0 < len(tokens) <= most:
            raise RecipeError(f"a text has {len(tokens)} tokens, but 1 to {most} can be scored at once; cut it into pieces")
        scores.append(continuation_log_likelihood(model, [], tokens, draws=draws, seed=seed))
    return scores
