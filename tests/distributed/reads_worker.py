"""Counts what a training reads of the device in its steps: `reads_worker.py PLAN.json OUT`, a list of [name, recipe, overrides].

Every run is that of the trainer; counted is what `update` does on the device (forward and backward, step, EMA) and what every step hands
to the report. What a logging step reads, and the making of the rows on the host, is outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_scale import recipe as recipes
from bd3_scale import train
from bd3_scale.distributed import layout
from bd3_scale.training.trainer import Trainer
from tests.distributed.worlds import results_of_ranks

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


def count(path: str, overrides: list[str]) -> tuple[dict[str, int], int]:
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
            (self.heartbeat, "beat"),
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
        train.train(recipe, layout.start(recipe.parallel, "cpu"))
    finally:
        Trainer.__init__, Trainer.update = made, update  # type: ignore[method-assign]
    return dict(reads.found), steps - 1


def main() -> None:
    results_of_ranks(count)


if __name__ == "__main__":
    main()
