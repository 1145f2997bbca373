"""What `export.py` wrote, read again: names and layout are ours, so every tensor is taken as it is.

A single safetensors file says what it is in its metadata, a Hugging Face directory in its config.json: the recipe (YAML), the
tokenizer's name and fingerprint, and the run's entries (the tuned interval). Invariant: the weights are the same bits.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bd3_scale import recipe as recipes
from bd3_scale.convert.key_map import KeyMap, same
from bd3_scale.convert.source import SafetensorsFiles, Source
from bd3_scale.errors import CheckpointError, RecipeError
from bd3_scale.recipe import Recipe

MODEL_TYPE = "bd3_scale"
KEY = "bd3_scale"
"""The entry of config.json, and of a file's metadata, that says the rest."""
FIELDS = ("recipe", "step", "tokenizer", "tuner")


def document_of(source: Source, config: dict[str, Any]) -> dict[str, Any] | None:
    """What the export said about itself; None where this is no export of ours. Raises CheckpointError for a damaged one."""
    document: Any = None
    if config.get("model_type") == MODEL_TYPE:
        document = config.get(KEY)
    elif isinstance(source, SafetensorsFiles) and KEY in source.metadata:
        try:
            document = json.loads(source.metadata[KEY])
        except ValueError:
            raise CheckpointError(f"{source.path}: its metadata {KEY} is not JSON; export it again") from None
    else:
        return None
    if not isinstance(document, dict) or set(document) != set(FIELDS) or not isinstance(document["recipe"], str):
        raise CheckpointError(f"{source.path}: its entry {KEY} does not say {', '.join(FIELDS)}; export it again")
    return document


def recipe_of(document: dict[str, Any], path: Path) -> Recipe:
    """The recipe that was exported."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(document["recipe"], "utf-8")
        try:
            return recipes.load(file, saved=True)
        except RecipeError as error:
            raise CheckpointError(f"{path}: its recipe cannot be read by this version: {error}") from None


def key_map(names: list[str]) -> KeyMap:
    """Every name for itself."""
    return KeyMap(whole=same(*sorted(names)), layer=())
