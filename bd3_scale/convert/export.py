"""A checkpoint for others: one safetensors file, or a Hugging Face directory that loads with `trust_remote_code=True`.

The names and the layout of the tensors stay ours, and so do the bits: `import` gives the same weights back. The directory holds
config.json, model.safetensors, tokenizer files and the modelling code of `hub/`, which needs torch and transformers only.
Invariants: one tensor in memory at a time; everything is written into a folder beside the target, which gets its name when it is
whole; what exists is never overwritten.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.checkpoint.shard_files import CHUNK
from bd3_scale.checkpoint.store import CURES, locate
from bd3_scale.convert import bd3_export
from bd3_scale.convert.universal import write_universal
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.data.tokenizer_files import write_tokenizer
from bd3_scale.errors import CheckpointError, RecipeError
from bd3_scale.generation.load_model import WEIGHTS, read_recipe, trained_objective
from bd3_scale.objectives.table import Objective
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.definition import free_keys

HUB = Path(__file__).parents[1] / "hub"
CODE = ("configuration_bd3.py", "modeling_bd3.py")
Tensors = dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]
"""Name -> (shape, how to make it)."""
MODELED = ("bd3", "mdlm", "ar")
"""Kinds of objectives that this code knows."""


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    kind: str
    """ema | weight."""
    parameters: int


@dataclass(frozen=True)
class Opened:
    """A checkpoint and what is said of it; `kind` of weights is exported."""

    checkpoint: Checkpoint
    kind: str
    recipe: Recipe
    tokenizer: Tokenizer
    objective: Objective

    @property
    def document(self) -> dict[str, Any]:
        """What an import needs beside the tensors (`bd3_export.FIELDS`)."""
        return {
            "recipe": recipes.to_yaml(_public(self.recipe)),
            "step": self.checkpoint.step,
            "tokenizer": {"name": self.recipe.data.tokenizer, "fingerprint": self.tokenizer.fingerprint},
            "tuner": self.checkpoint.run.get("tuner"),
        }

    @property
    def exported(self) -> Exported:
        return Exported(self.checkpoint.path, self.kind, sum(math.prod(shape) for shape in self.checkpoint.shapes(self.kind).values()))


def single_file(path: str | Path, out: Path, *, weights: str = "auto") -> Exported:
    """Write the weights of a checkpoint (`auto`: averaged where there are any) as one safetensors file. Raises UserError."""
    opened = open_checkpoint(path, weights)
    metadata = {"format": "pt", bd3_export.KEY: json.dumps(opened.document)}
    whole(out, lambda temporary: write_safetensors(temporary, opened.checkpoint, opened.kind, metadata))
    return opened.exported


def directory(path: str | Path, out: Path, *, weights: str = "auto") -> Exported:
    """Write a Hugging Face directory that AutoModelForMaskedLM.from_pretrained(..., trust_remote_code=True) loads. Raises UserError."""
    opened = open_checkpoint(path, weights)
    if opened.objective.traits.noise_conditioned:
        raise RecipeError(
            f"objective.kind={opened.objective.kind} tells its network the noise, which the modeling code of a directory does "
            "not; export one safetensors file instead"
        )
    if opened.objective.kind not in MODELED:
        raise RecipeError(
            f"objective.kind={opened.objective.kind} is none that the modeling code of a directory knows ({', '.join(MODELED)}); export "
            "one safetensors file instead"
        )

    def write(folder: Path) -> None:
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", opened.checkpoint, opened.kind, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_config(opened), indent=1) + "\n", "utf-8")
        write_tokenizer(opened.tokenizer, folder, opened.recipe.model.context)
        for name in CODE:
            shutil.copyfile(HUB / name, folder / name)

    whole(out, write)
    return opened.exported


def universal(path: str | Path, out: Path) -> Exported:
    """Write a universal checkpoint of DeepSpeed: weights and moments, to go on from. Raises UserError."""
    checkpoint = Checkpoint(locate(path))
    whole(out, lambda folder: write_universal(checkpoint, folder))
    return Exported(checkpoint.path, "weight", checkpoint.parameter_count)


def open_checkpoint(path: str | Path, weights: str) -> Opened:
    """The checkpoint at `path`, with `weights` (auto | ema | weight) resolved. Raises UserError."""
    if weights not in WEIGHTS:
        raise RecipeError(f"--weights is {weights!r}; set one of {', '.join(WEIGHTS)}")
    checkpoint = Checkpoint(locate(path))
    kind = ("ema" if "ema" in checkpoint.kinds else "weight") if weights == "auto" else weights
    if kind not in checkpoint.kinds:
        raise CheckpointError(f"checkpoint {checkpoint.path} has no {kind}, only {', '.join(checkpoint.kinds)}; set --weights auto")
    recipe = read_recipe(checkpoint)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    objective = trained_objective(checkpoint, recipe, tokenizer)
    return Opened(checkpoint, kind, recipe, tokenizer, objective)


def _public(recipe: Recipe) -> Recipe:
    """Without the places of this run's copies: an exported model is made to be given away, and a URL may hold credentials."""
    data = replace(recipe.data, remote=None, mixture=[replace(source, remote=None) for source in recipe.data.mixture])
    return replace(recipe, data=data, checkpoint=replace(recipe.checkpoint, remote=None))


def _config(opened: Opened) -> dict[str, Any]:
    """config.json: the network's shape with every default filled in, what sampling needs, and what `import` needs."""
    model, objective, tokenizer = opened.recipe.model, opened.objective, opened.tokenizer
    shape = {key: value for key, value in asdict(model).items() if key not in {"initial_std", *free_keys("model")}}
    shape |= {"head_width": model.head_size, "key_value_heads": model.kv_heads, "mlp_hidden": model.mlp_size}
    name = CODE[1].removesuffix(".py")
    return {
        "model_type": bd3_export.MODEL_TYPE,
        "architectures": ["BD3ForMaskedLM"],
        "auto_map": {
            "AutoConfig": f"{CODE[0].removesuffix('.py')}.BD3Config",
            "AutoModel": f"{name}.BD3ForMaskedLM",
            "AutoModelForMaskedLM": f"{name}.BD3ForMaskedLM",
        },
        "dtype": "float32",
        **shape,
        "vocab_size": tokenizer.model_vocabulary_size,
        "mask_token_id": tokenizer.mask_id,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        "objective": objective.kind,
        "block_size": objective.block_size,
        "clean_half": objective.pattern.clean_half,
        "tie_word_embeddings": False,  # a tied head has no tensor of its own here, so there is nothing for transformers to tie
        bd3_export.KEY: opened.document,
    }


def write_safetensors(path: Path, checkpoint: Checkpoint, kind: str, metadata: dict[str, str]) -> None:
    """All tensors of a kind, fp32. Raises OSError."""

    def maker(name: str) -> Callable[[], torch.Tensor]:
        return lambda: checkpoint.read(kind, name)

    write_tensors(path, {name: (shape, maker(name)) for name, shape in checkpoint.shapes(kind).items()}, metadata)


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """One safetensors file, sorted by name, fp32; each tensor is made when it is written. Raises OSError."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (shape, _) in sorted(tensors.items()):
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (shape, make) in sorted(tensors.items()):
            tensor = make()
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
            file.writelines(_little_endian(tensor))
        file.flush()
        os.fsync(file.fileno())


def _little_endian(tensor: torch.Tensor) -> Iterable[memoryview]:
    for part in tensor.reshape(-1).split(CHUNK // 4):
        yield part.numpy().astype("<f4", copy=False).data.cast("B")


def whole(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder beside `out`, then give it its name; nothing is left where it fails."""
    if out.exists():
        raise CheckpointError(f"{out} exists; name a new one")
    temporary = out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error.strerror or error}); {CURES.get(error.errno or 0, 'fix that')}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
