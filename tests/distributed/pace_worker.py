"""A training in which rank 1 is slow in every layer: `pace_worker.py RECIPE OVERRIDES`."""

from __future__ import annotations

import os
import sys
import time

from bd3_scale import train
from bd3_scale.fault_tolerance import pace
from bd3_scale.model.transformer import Block

pace.LONG = 3
forward = Block.forward


def slow(self, *arguments, **named):
    if os.environ["RANK"] == "1" and self.training:
        time.sleep(0.1)
    return forward(self, *arguments, **named)


Block.forward = slow  # type: ignore[method-assign]
sys.exit(train.main(sys.argv[1:]))
