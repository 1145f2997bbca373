"""A network ready to use from a checkpoint: for sampling, evaluation and the tools; no optimizer.

One process, or the ranks of one tensor-parallel group, each with its part of the weights, all calling alike. Whatever layout
wrote the checkpoint: a network that was trained in pipeline stages is whole here, and divided by tensor alone.

Invariants: nothing is used that was not verified against the index; names and shapes must be those of the saved recipe's
model; the tokenizer is the one the weights were trained with, by its fingerprint, or there is no network; all ranks of a
group have parts of one checkpoint, also where a training moves `latest` while they look.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bd3_scale import recipe as recipes
from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.index import RECIPE_NAME
from bd3_scale.checkpoint.reader import Checkpoint
from bd3_scale.checkpoint.region import Region
from bd3_scale.checkpoint.store import locate
from bd3_scale.collective_errors import Communicator, Solo, together
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.errors import CheckpointError, RecipeError
from bd3_scale.launcher import launched
from bd3_scale.megatron_core import parallel_state
from bd3_scale.model.layers import TensorParallelFactory, full_shape
from bd3_scale.model.norms import AllHeadsNorm, HeadNorm, Norm
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import Objective, ObjectiveSchedule
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.schema import ParallelConfig
from bd3_scale.rules.across_keys import context_divides_rows
from bd3_scale.rules.suggestions import Case, Problem
from bd3_scale.rules.validate import validate
from bd3_scale.tuning.interval_tuner import TunerState

WEIGHTS = ("auto", "ema", "weight")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class LoadedNetwork:
    """What a checkpoint holds for those who do not train it further."""

    recipe: Recipe
    tokenizer: Tokenizer
    network: Transformer
    """In eval mode, on `device`, in the recipe's precision for it (`auto`: fp32 on CPU, bf16 on CUDA)."""
    objective: Objective
    """That of the last update done: its block size and its tuned interval."""
    checkpoint: Checkpoint
    weights: str
    """Which were loaded: ema (averaged) | weight."""
    device: torch.device
    peers: Communicator = field(default_factory=Solo)
    """The ranks that hold parts of this network: they must use it together, with the same inputs in the same order."""


class TensorPeers:
    """The tensor-parallel group of this rank, for objects and barriers."""

    def __init__(self) -> None:
        self.rank = parallel_state.get_tensor_model_parallel_rank()
        self.world_size = parallel_state.get_tensor_model_parallel_world_size()
        self._group = parallel_state.get_tensor_model_parallel_group()

    def all_gather(self, value: Any) -> list[Any]:
        """Every peer's value, in rank order, on every peer."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self._group)


def load_network(
    path: str | Path, *, weights: str = "auto", device: str = "auto", block_size: int | None = None, context: int = 1
) -> LoadedNetwork:
    """Load a checkpoint folder, or the latest of a run directory, into a network: on one device, or divided over the ranks
    of the tensor-parallel group that exists; collective among these, and no other rank need call.

    `weights`: auto (averaged where there are any) | ema | weight; `device`: auto (CUDA where there is one) | cpu | cuda.
    `block_size`: which one of a network that was trained with a mixture of them; default: the one with the largest share.
    `context`: ranks that divide rows by positions, each with a network (the caller has made their groups).
    Unless the caller has joined a world, all processes that torchrun started become one tensor-parallel group (one process
    without torchrun). Raises CheckpointError for a checkpoint that is missing, damaged or of another tokenizer, DataError
    for a tokenizer that cannot be loaded, RecipeError for the options and for a number of processes that cannot divide it.
    """
    place = device_of_process(device)
    if weights not in WEIGHTS:
        raise RecipeError(f"weights is {weights!r}; set one of {', '.join(WEIGHTS)}")
    checkpoint = Checkpoint(locate(path))
    _join_world(read_recipe(checkpoint), place)
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    peers: Communicator = TensorPeers() if tensor > 1 else Solo()
    checkpoint = _that_of_the_first(checkpoint, peers)
    recipe = read_recipe(checkpoint)
    kind = ("ema" if "ema" in checkpoint.kinds else "weight") if weights == "auto" else weights
    if kind not in checkpoint.kinds:
        raise CheckpointError(f"checkpoint {checkpoint.path} has no {kind}, only {', '.join(checkpoint.kinds)}; set weights to auto")
    tokenizer = _tokenizer(checkpoint, recipe.data.tokenizer)
    objective = trained_objective(checkpoint, recipe, tokenizer, block_size, context)
    model = replace(recipe.model, attention="auto")  # a matter of the device, which may be another than that of the training
    network = Transformer(model, tokenizer.model_vocabulary_size, tokenizer.mask_id, TensorParallelFactory(tensor))
    parameters = network.named_parameters()
    checkpoint.load_into([part for name, value in parameters for part in _of_tensor_rank(kind, name, value, tensor)], peers)
    precision = torch.bfloat16 if recipes.resolve_precision(recipe.training, place.type) == "bf16" else torch.float32
    network = network.to(device=place, dtype=precision).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, (Norm, HeadNorm, AllHeadsNorm)):  # which compute in fp32: rounded as in training, converted once
            module.float()
    return LoadedNetwork(recipe, tokenizer, network, objective, checkpoint, kind, place, peers)


def _that_of_the_first(checkpoint: Checkpoint, peers: Communicator) -> Checkpoint:
    """The checkpoint that the first rank found: others may have looked before or after `latest` was moved."""
    if peers.world_size == 1:
        return checkpoint
    path = peers.all_gather(checkpoint.path)[0]
    opened = [checkpoint]

    def contents() -> list[tuple[str, str]]:
        if checkpoint.path != path:
            opened[0] = Checkpoint(path)
        return sorted((name, record.sha256) for name, record in opened[0].index.files.items())

    if any(other != contents() for other in together(peers, contents, str)):
        raise CheckpointError(f"checkpoint {path} is not the same on all ranks; name a folder on a file system that all nodes share")
    return opened[0]


def _of_tensor_rank(kind: str, name: str, parameter: torch.Tensor, tensor: int) -> list[Fragment]:
    """What of the checkpoint belongs into this rank's parameter; nothing where all its rows pad the vocabulary."""
    shape, dim = full_shape(parameter, tensor)
    if dim < 0:
        return [Fragment(kind, name, Region.whole(shape), parameter.detach().view(-1))]
    offset = parallel_state.get_tensor_model_parallel_rank() * parameter.shape[dim]
    size = min(parameter.shape[dim], shape[dim] - offset)
    if size <= 0:
        return []
    region = Region.divided(shape, dim, offset, size)
    return [Fragment(kind, name, region, parameter.detach().view(-1)[: region.numel])]


def read_recipe(checkpoint: Checkpoint) -> Recipe:
    """The recipe a checkpoint was written under, verified. Raises CheckpointError where this version cannot read it."""
    checkpoint.verify_files([RECIPE_NAME])
    try:
        return recipes.load(checkpoint.path / RECIPE_NAME, saved=True)
    except RecipeError as error:
        raise CheckpointError(f"checkpoint {checkpoint.path}: its {RECIPE_NAME} cannot be read by this version: {error}") from None


def device_of_process(name: str) -> torch.device:
    """The device of this process for auto | cpu | cuda. Raises RecipeError where there is none."""
    if name not in DEVICES:
        raise RecipeError(f"device is {name!r}; set one of {', '.join(DEVICES)}")
    if recipes.resolve_device(name, "device") == "cpu":
        return torch.device("cpu")
    # Whoever joins the world takes the device of its local rank.
    index = torch.cuda.current_device() if dist.is_initialized() else launched().local_rank
    devices = torch.cuda.device_count()
    if index >= devices:
        raise RecipeError(
            f"process {index} of this host has no CUDA device, there are {devices}; set --nproc-per-node {devices} or device cpu"
        )
    return torch.device("cuda", index)


def _tokenizer(checkpoint: Checkpoint, name: str) -> Tokenizer:
    tokenizer = load_tokenizer(name)
    trained = checkpoint.run.get("tokenizer")
    fingerprint = trained.get("fingerprint") if isinstance(trained, dict) else None
    if fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} was trained with another tokenizer (fingerprint {str(fingerprint)[:12]}) than "
            f"{name} is here ({tokenizer.fingerprint[:12]}); put the file it was trained with in that place"
        )
    return tokenizer


def trained_objective(
    checkpoint: Checkpoint, recipe: Recipe, tokenizer: Tokenizer, block_size: int | None = None, context: int = 1
) -> Objective:
    """The objective that a checkpoint's last update had, on the tuned interval; of a mixture of block sizes that of `block_size`, or of the
    largest share; for rows that `context` ranks divide, however many did in training. Raises RecipeError for a size that it was not trained
    with, and for rows that so many ranks cannot divide."""
    recipe = replace(recipe, parallel=replace(recipe.parallel, context=context))
    schedule = ObjectiveSchedule.of(recipe, tokenizer.mask_id, tokenizer.end_of_text)
    # `step` counts updates done: the last of them was update step - 1.
    size = next(iter(schedule.shares)) if len(schedule.shares) > 1 else schedule.size_at(max(0, checkpoint.step - 1))
    trained = sorted(schedule.shares) if len(schedule.shares) > 1 else [size]
    if block_size is not None and block_size not in trained:
        known = " or ".join(map(str, trained))
        raise RecipeError(f"the block size is {block_size}, but {checkpoint.path} was trained with {known}; set {known} or leave it out")
    size, saved = block_size or size, checkpoint.run.get("tuner")
    _check_context_ranks(recipe, size, context)
    if saved is None:
        return schedule.of_size(size)
    return schedule.of_size(size, TunerState.from_dict(saved).at(size, recipe.objective.interval).interval)


def _join_world(recipe: Recipe, place: torch.device) -> None:
    """The linears ask megatron-core for their group: make one of all processes unless the caller has made the groups."""
    from bd3_scale.distributed import layout

    if dist.is_initialized() and parallel_state.model_parallel_is_initialized():
        return
    tensor = dist.get_world_size() if dist.is_initialized() else launched().world_size
    check_tensor_ranks(recipe, tensor)
    layout.start(ParallelConfig(tensor=tensor, timeout=recipe.parallel.timeout), place.type)


def check_tensor_ranks(recipe: Recipe, count: int) -> None:
    """Raise RecipeError where `count` ranks cannot share the recipe's network; it names the nearest smaller number that can."""
    if count == 1:
        return
    try:
        _validate_divided(recipe, count)
    except RecipeError as error:
        for fewer in range(count - 1, 0, -1):
            try:
                _validate_divided(recipe, fewer)
            except RecipeError:
                continue
            reason = str(error).partition(";")[0]
            raise RecipeError(f"{count} processes cannot share this network: {reason}; start it with --nproc-per-node {fewer}") from None
        raise


def _check_context_ranks(recipe: Recipe, size: int, count: int) -> None:
    """Raise RecipeError where `count` ranks cannot divide rows in blocks of `size`; it names the largest part of them that can."""
    if recipe.objective.traits.in_blocks:
        recipe = replace(recipe, objective=replace(recipe.objective, block_size=size))

    def problem(ranks: int) -> Problem | None:
        return context_divides_rows(Case(replace(recipe, parallel=ParallelConfig(context=ranks)), ranks, None, None))

    if (found := problem(count)) is not None:
        fewer = next(ranks for ranks in range(count - 1, 0, -1) if count % ranks == 0 and problem(ranks) is None)
        raise RecipeError(f"{count} processes cannot divide a row: {found.text}; set --context {fewer}")


def _validate_divided(recipe: Recipe, tensor: int) -> None:
    validate(replace(recipe, parallel=ParallelConfig(tensor=tensor)), tensor)
