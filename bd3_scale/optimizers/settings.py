"""The optimizers by name: what the recipe says of them, and how each is built around an engine's masters.

Another one that updates element by element is a row of `recipe.optimizers.OPTIMIZERS` (its states) and a row of `BUILDERS`: a torch
optimizer with what `SkippingAdamW` has besides (`rule`, `begin`, `states`, `resume`). One that needs whole matrices, as muon does, is also
bound to them (`Engine.bind_optimizer`) and has costs of its own (`costs/orthogonal_step.py`).

Invariant: every master is in exactly one group, and all parameters of a master keep the states of one name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bd3_scale.optimizers.adamw import SkippingAdamW, SkipStepRule
from bd3_scale.optimizers.muon import Muon
from bd3_scale.recipe.optimizers import OPTIMIZERS, States, is_hidden
from bd3_scale.recipe.schema import ModelConfig


@dataclass(frozen=True)
class OptimizerSettings:
    """`clip`: largest global gradient norm, 0 for none; weight decay acts on matrices only; see adamw.py for spikes."""

    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    clip: float
    spike_deviations: float = 0.0
    name: str = "adamw"
    momentum: float = 0.95
    model: ModelConfig = field(default_factory=ModelConfig)
    """Whose weights pack matrices (muon)."""
    bf16: bool = False

    @property
    def states(self) -> States:
        """What it keeps, by the names of parameters."""
        return OPTIMIZERS[self.name]

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups without parameters, in the order of `group_of`."""
        decayed, plain = {"params": [], "weight_decay": self.weight_decay}, {"params": [], "weight_decay": 0.0}
        hidden = [{**decayed, "params": [], "momentum": self.momentum}] if self.states.whole_matrices else []
        return [decayed, plain, *hidden]

    def group_of(self, name: str, dimensions: int) -> int:
        """The group of the parameter `name`."""
        return 2 if self.states.whole_matrices and is_hidden(name) else int(dimensions < 2)

    def build(self, groups: list[dict[str, Any]], device: torch.device) -> SkippingAdamW:
        """The optimizer of `groups`, to which masters may be added before the first step."""
        return BUILDERS[self.name](self, groups, SkipStepRule(self.spike_deviations, device))


def _adamw(settings: OptimizerSettings, groups: list[dict[str, Any]], rule: SkipStepRule) -> SkippingAdamW:
    return SkippingAdamW(groups, settings.betas, settings.epsilon, rule)


def _muon(settings: OptimizerSettings, groups: list[dict[str, Any]], rule: SkipStepRule) -> SkippingAdamW:
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    return Muon(groups, settings.betas, settings.epsilon, rule, settings.model, dtype)


BUILDERS: dict[str, Callable[[OptimizerSettings, list[dict[str, Any]], SkipStepRule], SkippingAdamW]] = {"adamw": _adamw, "muon": _muon}
assert BUILDERS.keys() == OPTIMIZERS.keys()
