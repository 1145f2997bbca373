"""A recipe on so many devices of one kind: everything that a plan derives before it counts anything.

Invariant: a `Situation` only exists for a recipe that `config.validate` takes at this world size, on this kind of device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from bd3_scale.config import Recipe, resolve_precision, validate
from bd3_scale.diffusion.config import IN_BLOCKS, block_sizes
from bd3_scale.diffusion.mask import AttentionPattern
from bd3_scale.diffusion.objectives import objective_at
from bd3_scale.errors import DataError
from bd3_scale.parallel import stages
from bd3_scale.parallel.activations import Batch
from bd3_scale.planning.devices import Device

PADDED = {"cpu": 1, "cuda": 256}
"""The number of selected positions is padded to a multiple of this (`Trainer.pad_to`)."""


@dataclass(frozen=True)
class Phase:
    """Steps of a run with one attention pattern: a stage of `objective.block_size`."""

    steps: int
    block_size: int
    pattern: AttentionPattern


@dataclass(frozen=True)
class Situation:
    """`vocabulary` is V, MASK included."""

    recipe: Recipe
    world_size: int
    device: Device
    vocabulary: int

    @property
    def replicas(self) -> int:
        return self.world_size // (self.recipe.parallel.tensor * self.recipe.parallel.pipeline)

    @property
    def sharers(self) -> int:
        """Data-parallel ranks that share one copy of what ZeRO divides."""
        return self.recipe.parallel.shard or self.replicas

    @property
    def micro_batch(self) -> int:
        return self.recipe.micro_batch(self.replicas)

    @property
    def micro_batches(self) -> int:
        """Of a step, on one replica."""
        return self.recipe.training.global_batch // (self.replicas * self.micro_batch)

    @property
    def precision(self) -> str:
        return resolve_precision(self.recipe, self.device.type)

    @cached_property
    def phases(self) -> list[Phase]:
        recipe = self.recipe
        total = recipe.total_steps
        sizes = block_sizes(recipe.objective.block_size) if recipe.objective.kind in IN_BLOCKS else ((0, 0),)
        ends = [start for start, _ in sizes[1:]] + [total]
        found = []
        for (start, _), end in zip(sizes, ends, strict=True):
            if start < min(end, total):
                objective = objective_at(recipe.objective, recipe.model.context, self.vocabulary - 1, start)
                found.append(Phase(min(end, total) - start, objective.block_size, objective.pattern))
        return found

    @property
    def pattern(self) -> AttentionPattern:
        """Of step 0, by which the stages are cut, as `Trainer` does."""
        return self.phases[0].pattern

    @property
    def selected(self) -> float:
        """Expected share of the data tokens that reach the head."""
        return stages.selected_share(self.recipe, self.pattern)

    @cached_property
    def chunks(self) -> list[range]:
        """Layers of each of the pipeline x virtual stages."""
        recipe = self.recipe
        return _chunks(_Key(recipe, self.replicas), self.vocabulary, self.pattern, self.selected)

    def stages_of(self, pipeline_rank: int) -> list[range]:
        return stages.of_rank(self.chunks, self.recipe.parallel.pipeline, pipeline_rank)

    def batch(self) -> Batch:
        """The expected micro-batch on one tensor rank."""
        parallel, model = self.recipe.parallel, self.recipe.model
        selected = max(1, round(self.micro_batch * (model.context - 1) * self.selected))
        padded = -(-selected // PADDED[self.device.type]) * PADDED[self.device.type]
        weight = 2 if self.precision == "bf16" else 4
        return Batch(model, self.pattern, self.micro_batch, padded, parallel.tensor, parallel.sequence, weight, self.device.type)


class _Key:
    """What a division of the layers depends on, as a key of a cache: a search asks for the same few again and again."""

    def __init__(self, recipe: Recipe, replicas: int) -> None:
        self.recipe, self.replicas = recipe, replicas
        parallel = recipe.parallel
        given = parallel.stage_layers and tuple(parallel.stage_layers)
        self.values = (
            recipe.objective.kind,
            repr(recipe.model),
            parallel.pipeline * parallel.virtual_stages,
            recipe.micro_batch(replicas),
            given,
        )

    def __hash__(self) -> int:
        return hash(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.values == other.values


@lru_cache(maxsize=256)
def _chunks(key: _Key, vocabulary: int, pattern: AttentionPattern, selected: float) -> list[range]:
    return stages.chunks_of(key.recipe, key.replicas, vocabulary, pattern, selected)


def situation(recipe: Recipe, world_size: int, device: Device, vocabulary: int | None = None) -> Situation:
    """Check the recipe as a run on the cluster would, then derive. `vocabulary`: default, that of the recipe's tokenizer. Raises
    RecipeError as `validate`, DataError for a tokenizer that cannot be read."""
    validate(recipe, world_size, device.type)
    if vocabulary is None:
        from bd3_scale.data.tokenizer import load_tokenizer

        try:
            vocabulary = load_tokenizer(recipe.data.tokenizer).model_vocabulary_size
        except DataError as error:
            raise DataError(f"{error}; to plan without it, give the number of its ids and MASK as --vocabulary") from None
    return Situation(recipe, world_size, device, vocabulary)
