"""A recipe as a whole: its sections (`schema.py`), the numbers that follow from several of them, and the table of all keys."""

from __future__ import annotations

from dataclasses import dataclass

from bd3_scale.batches import BatchSchedule, Shares
from bd3_scale.recipe.keys import facts_of, section
from bd3_scale.recipe.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RunConfig,
    TrackingConfig,
    TrainingConfig,
    TunerConfig,
    ValidationConfig,
)
from bd3_scale.recipe.stages import batch_schedule


@dataclass
class Recipe:
    """Everything that defines a run. See each section's class for its keys."""

    run: RunConfig = section(RunConfig)
    model: ModelConfig = section(ModelConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    tuner: TunerConfig = section(TunerConfig)
    data: DataConfig = section(DataConfig)
    training: TrainingConfig = section(TrainingConfig)
    validation: ValidationConfig = section(ValidationConfig)
    parallel: ParallelConfig = section(ParallelConfig, change="free")
    checkpoint: CheckpointConfig = section(CheckpointConfig, change="free")
    tracking: TrackingConfig = section(TrackingConfig, change="free")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.tokens is not None, "validate() asks for one of the two"
        return self.batches.steps_for(-(-self.training.tokens // self.model.context))

    @property
    def batches(self) -> BatchSchedule:
        """The rows of data of every update. Raises RecipeError as `batch_schedule`."""
        return batch_schedule(self.training.global_batch, self.objective.draws)

    def every_shares(self, replicas: int) -> list[Shares]:
        """The same of every global batch of the run."""
        return [self.parallel.shares(replicas, phase.rows, self.objective.draws) for phase in self.batches.phases]

    def micro_batch(self, replicas: int) -> int:
        """The most rows of data per forward where the global batch is shared by `replicas` data-parallel ranks."""
        return max(shares.micro_batch for shares in self.every_shares(replicas))

    def tokens_before(self, step: int) -> int:
        """Data tokens of the first `step` updates."""
        return self.batches.samples_before(step) * self.model.context


KEYS = facts_of(Recipe)
"""{dotted key: its facts}, of every key of every section."""

FORMER_NAMES = {f"{name.partition('.')[0]}.{facts.was}": name for name, facts in KEYS.items() if facts.was}
"""{dotted key as earlier versions called it: its name of today}."""


def free_keys(section: str) -> set[str]:
    """Keys of a section that may change whenever a run is continued."""
    return {name.split(".")[1] for name, facts in KEYS.items() if name.startswith(f"{section}.") and facts.change == "free"}
