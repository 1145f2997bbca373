"""A recipe on so many devices of one kind: everything that a plan derives before it counts anything.

Invariant: a `ClusterPlan` only exists for a recipe that `rules.validate` takes at this world size, on this kind of device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from bd3_scale.batches import Shares
from bd3_scale.costs import pipeline_stages
from bd3_scale.costs.activation_memory import Batch
from bd3_scale.costs.parameter_shapes import Units, units_of
from bd3_scale.costs.pipeline_stages import Phase
from bd3_scale.costs.sizes import VOCABULARY_MULTIPLE
from bd3_scale.errors import DataError
from bd3_scale.objectives.table import selected_multiple
from bd3_scale.planning.devices import Device
from bd3_scale.recipe import Recipe, resolve_precision
from bd3_scale.recipe.schema import ModelConfig, ObjectiveConfig, ParallelConfig, TrainingConfig
from bd3_scale.rules.validate import validate


@dataclass(frozen=True)
class ClusterPlan:
    """`vocabulary` is V, MASK included."""

    recipe: Recipe
    world_size: int
    device: Device
    vocabulary: int

    @property
    def model(self) -> ModelConfig:
        return self.recipe.model

    @property
    def objective(self) -> ObjectiveConfig:
        return self.recipe.objective

    @property
    def training(self) -> TrainingConfig:
        return self.recipe.training

    @property
    def parallel(self) -> ParallelConfig:
        return self.recipe.parallel

    @property
    def replicas(self) -> int:
        return self.world_size // (self.parallel.tensor * self.parallel.context * self.parallel.pipeline)

    @property
    def states(self) -> int:
        """Ranks over which gradients are summed: those of data and context together."""
        return self.replicas * self.parallel.context

    @property
    def sharers(self) -> int:
        """Those of them that share one copy of what ZeRO divides."""
        return (self.parallel.shard or self.replicas) * self.parallel.context

    def shares(self, phase: Phase | None = None) -> Shares:
        """Of the replicas in a global batch of a phase (None: the longest); filler is computed, and takes its time."""
        return self.parallel.shares(self.replicas, (phase or self.longest).rows, self.objective.draws)

    @property
    def precision(self) -> str:
        return resolve_precision(self.training, self.device.type)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        return pipeline_stages.phases_of(self.recipe, self.vocabulary - 1, self.device.type)

    @property
    def longest(self) -> Phase:
        """The phase with the most samples."""
        return max(self.phases, key=lambda phase: phase.steps * phase.rows)

    @cached_property
    def chunks(self) -> list[range]:
        """Layers of each of the pipeline x virtual stages."""
        return _chunks(_Key(self.recipe, self.replicas), self.vocabulary, self.phases)

    def stages_of(self, pipeline_rank: int) -> list[range]:
        return pipeline_stages.of_rank(self.chunks, self.parallel.pipeline, pipeline_rank)

    def units_of(self, pipeline_rank: int) -> list[Units]:
        """What one tensor rank of a stage holds, chunk by chunk."""
        model, tensor, multiple = self.model, self.parallel.tensor, VOCABULARY_MULTIPLE[self.device.type]
        return [units_of(model, self.vocabulary, layers, tensor, multiple) for layers in self.stages_of(pipeline_rank)]

    def batch(self, phase: Phase | None = None) -> Batch:
        """The expected micro-batch on one tensor rank, its share on one context rank, in a phase of the run (None: the longest)."""
        parallel, model = self.parallel, self.model
        phase = phase or self.longest
        pattern, rows = phase.pattern, self.shares(phase).micro_batch
        share = pipeline_stages.selected_share(self.objective, pattern)
        selected = max(1, round(rows * pattern.draws * (model.context - 1) * share / parallel.context))
        multiple = selected_multiple(parallel, self.device.type)
        padded = -(-selected // multiple) * multiple
        weight = 2 if self.precision == "bf16" else 4
        return Batch(
            model,
            pattern.share(0, parallel.context, parallel.context_exchange == "ring"),
            rows,
            padded,
            parallel.tensor,
            parallel.sequence,
            weight,
            self.device.type,
            self.objective.traits,
        )


class _Key:
    """What a division of the layers depends on, as a key of a cache: a search asks for the same few again and again."""

    def __init__(self, recipe: Recipe, replicas: int) -> None:
        self.recipe, self.replicas = recipe, replicas
        parallel = recipe.parallel
        given = parallel.stage_layers and tuple(parallel.stage_layers)
        self.values = (
            recipe.objective.kind,
            tuple(recipe.objective.interval),
            recipe.objective.noise_schedule,
            (recipe.objective.density, *(recipe.objective.density_shape or ())),
            repr(recipe.model),
            parallel.pipeline * parallel.virtual_stages,
            tuple((shares.micro_batch, shares.micro_batches) for shares in recipe.every_shares(replicas)),
            given,
        )

    def __hash__(self) -> int:
        return hash(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.values == other.values


@lru_cache(maxsize=256)
def _chunks(key: _Key, vocabulary: int, phases: tuple[Phase, ...]) -> list[range]:
    return pipeline_stages.chunks_of(key.recipe.model, key.recipe.objective, key.recipe.parallel, key.replicas, vocabulary, phases)


def cluster_plan(recipe: Recipe, world_size: int, device: Device, vocabulary: int | None = None) -> ClusterPlan:
    """Check the recipe as a run on the cluster would, then derive. `vocabulary`: default, that of the recipe's tokenizer. Raises
    RecipeError as `validate`, DataError for a tokenizer that cannot be read."""
    validate(recipe, world_size, device.type)
    if vocabulary is None:
        from bd3_scale.data.tokenizer import load_tokenizer

        try:
            vocabulary = load_tokenizer(recipe.data.tokenizer).model_vocabulary_size
        except DataError as error:
            raise DataError(f"{error}; to plan without it, give the number of its ids and MASK as --vocabulary") from None
    return ClusterPlan(recipe, world_size, device, vocabulary)
