"""Which format a source has, and everything that follows from it: the one place that knows all formats that can be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bd3_scale.convert import bd3_export, causal, deepspeed, diffusion, published
from bd3_scale.convert.source import Source, open_source, read_json
from bd3_scale.convert.write import Import
from bd3_scale.data.tokenizer_files import UNCHANGED
from bd3_scale.errors import CheckpointError, RecipeError, one_line
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.objective_kinds import KINDS, block_sizes
from bd3_scale.recipe.schema import ModelConfig, ObjectiveConfig

GPT2_IDS = 50257


def detect(
    path: Path, *, tokenizer: str | None, objective: str | None, block_size: int | None, config_file: Path | None = None
) -> tuple[Import, str]:
    """(what the source is, its tokenizer). `objective` and `block_size` say how training goes on; None: as the source was
    trained, and for causal language models as block diffusion. `config_file`: a config.json that does not lie beside the weights.
    Raises UserError."""
    source, config = _opened(path, config_file)
    document = bd3_export.document_of(source, config)
    if document is not None:
        recipe = bd3_export.recipe_of(document, path)
        if recipe.objective.traits.in_blocks and not isinstance(recipe.objective.block_size, dict):
            # Of a schedule of block sizes the one that was reached: the checkpoint that is made stands at step 0.
            reached = [size for step, size in block_sizes(recipe.objective.block_size) if step < max(1, document["step"])]
            recipe = replace(recipe, objective=replace(recipe.objective, block_size=reached[-1]))
        found = Import(source, bd3_export.key_map(list(source.shapes)), recipe, _longest(recipe.model), "bd3_scale", document["tuner"])
        return _continued(found, objective, block_size), tokenizer or _exported_tokenizer(path, document)
    if published.recognised(source.shapes):
        if block_size is not None:
            config = {**config, "block_size": block_size}
        recipe, names, tuner = published.describe(source, config)
        found = Import(source, names, recipe, None, "the paper's weights", tuner)
        return _continued(found, objective, None), tokenizer or "gpt2"
    kind, families = str(config.get("model_type")), {**causal.FAMILIES, **diffusion.FAMILIES}
    if kind in families:
        try:
            said = families[kind](config)
        except (TypeError, ValueError, AttributeError) as error:
            text = f"config.json of {path} has a value that is none of its key ({one_line(error)})"
            raise CheckpointError(f"{text}; take the config.json that belongs to the weights") from None
        recipe = replace(Recipe(), model=said.model)
        found = Import(source, said.names, recipe, said.longest, f"{kind} (Hugging Face)", note=said.note)
        return _continued(found, objective or said.objective, block_size), tokenizer or _their_tokenizer(path, config)
    if kind in causal.REFUSED:
        raise CheckpointError(f"{path}: {kind} {causal.REFUSED[kind]}, which is not computed here; take a model of the Llama family")
    known = ", ".join((*families, *published.MODEL_TYPES, bd3_export.MODEL_TYPE))
    raise CheckpointError(f"{path}: model_type is {config.get('model_type')!r}, which cannot be converted; known are {known}")


def _opened(path: Path, config_file: Path | None) -> tuple[Source, dict[str, Any]]:
    given = read_json(config_file) if config_file is not None else None
    if deepspeed.is_universal(path):
        if given is None and not (path / "config.json").exists():
            raise CheckpointError(f"{path} does not say which model it is of; name the model's config.json with --config")
        return deepspeed.UniversalFolder(path), given or read_json(path / "config.json")
    deepspeed.refuse_zero(path)
    return open_source(path, given)


def _continued(found: Import, objective: str | None, block_size: int | None) -> Import:
    """The same with another objective, where one is asked for."""
    before = found.recipe.objective
    kind = objective or before.kind
    if kind not in KINDS:
        raise RecipeError(f"--objective is {kind!r}; set one of {', '.join(KINDS)}")
    if block_size is not None and not KINDS[kind].in_blocks:
        raise RecipeError(f"--block-size means nothing to {kind}; leave it out or set --objective bd3")
    if kind == before.kind and block_size is None:
        return found
    size = block_size if block_size is not None else before.block_size if kind == before.kind else None
    return replace(found, recipe=replace(found.recipe, objective=ObjectiveConfig(kind, size)), tuner=None)


def _longest(model: ModelConfig) -> int | None:
    return model.context if model.positions == "learned" else None


def _exported_tokenizer(path: Path, document: dict[str, Any]) -> str:
    name = document["tokenizer"].get("name") if isinstance(document["tokenizer"], dict) else None
    if name in ("gpt2", "bytes"):
        return str(name)
    for file in (UNCHANGED, "tokenizer.json"):
        if path.is_dir() and (path / file).exists():
            return str(path / file)
    raise CheckpointError(f"{path} holds no tokenizer; name the one of the weights with --tokenizer")


def _their_tokenizer(path: Path, config: dict[str, Any]) -> str:
    if (path / "tokenizer.json").exists():
        return str(path / "tokenizer.json")
    if config["model_type"] == "gpt2" and config.get("vocab_size") == GPT2_IDS:
        return "gpt2"
    raise CheckpointError(f"{path} holds no tokenizer.json; name a file of the `tokenizers` package with --tokenizer (or gpt2, bytes)")
