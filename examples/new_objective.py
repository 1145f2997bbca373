"""A training objective of one's own: block diffusion whose loss weights are capped, so that lightly masked blocks do not dominate.

    python examples/new_objective.py recipes/quickstart.yaml objective.kind=capped_bd3

trains it, alone or under torchrun, in every layout. Commands that read such a checkpoint must import this file first:

    PYTHONPATH=examples python -c "import new_objective, bd3_scale.sample; bd3_scale.sample.main()" runs/quickstart

A masked token weighs 1/t in the likelihood bound. Here training uses min(1/t, LARGEST_WEIGHT); validation is unchanged, so that its
NELBO compares with that of bd3.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np

from bd3_scale import Kind, register_objective
from bd3_scale.objectives.bd3 import BlockDiffusion
from bd3_scale.objectives.network_inputs import NetworkInputs

LARGEST_WEIGHT = 5.0


@register_objective(Kind("capped_bd3", unused_keys=("noise_schedule",)))
@dataclass(frozen=True)
class CappedBlockDiffusion(BlockDiffusion):
    """Block diffusion with weights min(1/t, LARGEST_WEIGHT). What it does not override is that of `bd3`, its noise above all."""

    def training_inputs(self, rows: np.ndarray, slots: np.ndarray, step: int, seed: int, global_batch: int) -> NetworkInputs:
        inputs = super().training_inputs(rows, slots, step, seed, global_batch)
        return replace(inputs, weights=inputs.weights.clamp(max=LARGEST_WEIGHT))


if __name__ == "__main__":
    from bd3_scale.train import main

    sys.exit(main())
