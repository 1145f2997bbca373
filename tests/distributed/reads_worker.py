"""Counts what a training reads of the device in its steps: `reads_worker.py PLAN.json OUT`, a list of [name, recipe, overrides].

Every run is that of the trainer; counted is what `update` does on the device (forward and backward, step, EMA) and what every step hands
to the report. What a logging step reads, and the making of the rows on the host, is outside.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_scale import recipe as recipes
from bd3_scale import train
from bd3_scale.distributed import layout
from bd3_scale.training.trainer import Trainer

READING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "repeat_interleave")
"""Operators whose result the host, or the shape of their output, waits for."""
BY_MASK = ("index", "index_put", "index_put_")
"""Those that wait where they are given a mask (but not to put one number: then they fill by the mask)."""


class Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function._schema.name.split("::")[-1]
        if name in READING or (name in BY_MASK and _by_mask(*arguments[1:3])):
            self.found[name] += 1
        return function(*arguments, **(keywords or {}))

    def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            with self:
                return function(*arguments, **named)

        return run


def _by_mask(indices: list[Tensor | None], values: Tensor | None = None) -> bool:
    return any(one is not None and one.dtype == torch.bool for one in indices) and (values is None or values.numel() > 1)


def count(path: str, overrides: list[str], here: layout.Layout) -> tuple[dict[str, int], int]:
    """Reads in all steps of a training but the first (in which ZeRO 3 learns what is needed when), and how many steps those were."""
    reads, steps = Reads(), 0
    made, update = Trainer.__init__, Trainer.update

    def initialised(self: Trainer, *arguments: Any) -> None:
        made(self, *arguments)
        assert self.ema is not None
        engine: Any = self.engine
        for owner, name in (
            (engine, "forward_backward"),
            (engine, "step"),
            (self.ema, "update"),
            (self.report, "add"),
            (self.pulse, "beat"),
        ):
            setattr(owner, name, reads.within(getattr(owner, name)))

    def updated(self: Trainer) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            reads.found.clear()
        return update(self)

    recipe = recipes.load(path, overrides)
    Trainer.__init__, Trainer.update = initialised, updated  # type: ignore[method-assign]
    try:
        train.train(recipe, here)
    finally:
        Trainer.__init__, Trainer.update = made, update  # type: ignore[method-assign]
    return dict(reads.found), steps - 1


def main() -> None:
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    rank, world_size = int(os.environ.get("RANK", "0")), recipes.world_size_of_environment()
    results = {}
    for number, (name, path, overrides) in enumerate(plan):
        store = dist.FileStore(f"{sys.argv[1]}.{number}.store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        here = layout.start(recipes.load(path, overrides).parallel, "cpu")
        results[name] = here.all_gather(count(path, overrides, here))
        layout.stop()
        gc.collect()
    if rank == 0:
        with open(sys.argv[2], "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
