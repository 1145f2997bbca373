"""What a checkpoint keeps of a run beside its tensors, its step and its samples: what training decided, and what it was trained on.

Invariants: a state is never changed, only replaced; its keys in a checkpoint are those of all earlier versions, and entries that this
version does not know (a conversion's) are kept as they are, so that what was just loaded is saved as the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from bd3_scale.data.open import Data
from bd3_scale.recipe.schema import ObjectiveConfig
from bd3_scale.tuning.interval_tuner import TunerState


@dataclass(frozen=True)
class RunState:
    """See the module; all but `tuner` are JSON."""

    tuner: TunerState
    tokenizer: Mapping[str, Any] | None
    """{name, fingerprint} of the one the run began with; None in checkpoints that are older than this entry."""
    data: Mapping[str, Any]
    """{fingerprint}."""
    wandb: str | None = None
    """The id of the run there."""
    step_rule: Mapping[str, Any] | None = None
    """See `SkipStepRule.state`; None where no step was saved yet."""
    amendments: Sequence[Mapping[str, Any]] = ()
    """See `resume.Found`."""
    unfinished_validation: bool = False
    """The run was asked to stop during the validation of its step."""
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, objective: ObjectiveConfig, data: Data) -> Self:
        """Of a new run."""
        tokenizer = {"name": data.tokenizer.name, "fingerprint": data.tokenizer.fingerprint}
        return cls(TunerState.begin(objective), tokenizer, {"fingerprint": data.fingerprint})

    @classmethod
    def from_dictionary(cls, run: Mapping[str, Any]) -> Self:
        """Of a checkpoint. Raises CheckpointError where the tuner's part is none."""
        others = dict(run)
        tuner, tokenizer, data = TunerState.from_dict(others.pop("tuner")), others.pop("tokenizer", None), others.pop("data", {})
        wandb, rule, amendments = others.pop("wandb", None), others.pop("step_rule", None), others.pop("amendments", ())
        return cls(tuner, tokenizer, data, wandb, rule, amendments, others.pop("unfinished_validation", False), others)

    def to_dictionary(self) -> dict[str, Any]:
        """For a checkpoint; an entry that says nothing is left out."""
        entries = {
            "tokenizer": self.tokenizer,
            "step_rule": self.step_rule,
            "amendments": list(self.amendments),
            "unfinished_validation": self.unfinished_validation,
        }
        said = {name: value for name, value in entries.items() if value}
        return {**self.others, "tuner": self.tuner.to_dict(), "data": self.data, "wandb": self.wandb, **said}
