"""Trainings in which a bit of one weight on rank 2 flips before a save: `corrupt_worker.py RECIPE OVERRIDES`."""

from __future__ import annotations

import os
import sys

import torch

from bd3_scale import train
from bd3_scale.training.trainer import Trainer

save = Trainer.save


def corrupted(self: Trainer) -> None:
    if os.environ["RANK"] == "2" and self.step == 4:
        self.engine.settle()
        weight = next(iter(self.engine.networks[0].parameters())).detach()
        weight = getattr(weight, "to_local", lambda: weight)()
        weight.view(-1).view(torch.int32)[3] ^= 1 << 7
    save(self)


Trainer.save = corrupted  # type: ignore[method-assign]
sys.exit(train.main(sys.argv[1:]))
