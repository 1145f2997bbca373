"""Masked diffusion: a row is one block, and its noisy half alone in the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.objectives.bd3 import AbsorbingDiffusion
from bd3_scale.recipe.objective_kinds import KINDS, VALIDATION_INTERVAL, Kind


@dataclass(frozen=True)
class MaskedDiffusion(AbsorbingDiffusion):
    """Masked diffusion (MDLM, Sahoo et al. 2024): one block and one t per row, and x_t alone in the network.

    It is block diffusion with L' = L: the same noise, weights, losses and rows of the network.
    """

    traits: ClassVar[Kind] = KINDS["mdlm"]

    mask_id: int
    context: int
    interval: tuple[float, float] = VALIDATION_INTERVAL
    noise_schedule: str = "linear"
    pad_to: int = 1
    resample: bool = False
    density: str = "uniform"
    density_shape: tuple[float, ...] = ()
    learned: tuple[float, ...] = ()
    masked_nll: tuple[float, ...] = ()
    block_size: int = field(init=False)
    pattern: AttentionPattern = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", self.context)
        self._check()
        object.__setattr__(self, "pattern", AttentionPattern("full", self.context, self.context))
