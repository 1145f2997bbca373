"""Runs many small trainings in one set of processes, because starting one costs more than a training.

`worker.py PLAN.json`: a list of [recipe file, list of overrides]; each is trained to its end in its own run.dir. Each
training joins and leaves a world of its own: the threads of hundreds of groups of earlier ones would slow the later ones.
Every rank that scores leaves there how much loss each token had as a target, in training and validation: `loss_of_tokens.RANK.npy`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd3_scale import compiling, train
from bd3_scale import recipe as recipes
from bd3_scale.costs import sizes
from bd3_scale.distributed import layout
from bd3_scale.launcher import launched
from bd3_scale.model.loss_head import Head
from bd3_scale.rules.validate import validate
from tests.distributed.worlds import worlds

sizes.SMALLEST_BUCKET = 1000  # so that networks this small are reduced and gathered in several
compiling.BACKEND = "aot_eager"  # the same graphs as Inductor's, without a C++ compiler's minute for each
LOSS_OF_TOKENS = torch.zeros(258)
"""Of bytes, end of text and MASK."""
scored = Head.forward


def forward(head: Head, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None, *more: Any) -> Any:
    result = scored(head, hidden, targets, weights, *more)
    if targets is not None and weights is not None:
        LOSS_OF_TOKENS.index_add_(0, targets, (weights * result[1]).abs())
    return result


def main() -> None:
    Head.forward = forward  # type: ignore[method-assign,assignment]
    for path, overrides in worlds():
        LOSS_OF_TOKENS.zero_()
        recipe = recipes.load(path, overrides)
        validate(recipe, launched().world_size, "cpu")
        here = layout.start(recipe.parallel, "cpu")
        train.train(recipe, here)
        if LOSS_OF_TOKENS.any():
            np.save(Path(recipe.run.dir) / f"loss_of_tokens.{launched().rank}.npy", LOSS_OF_TOKENS.numpy())
        here.barrier()


if __name__ == "__main__":
    main()
