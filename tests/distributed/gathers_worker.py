"""What waits for which weights (engines/gathers.py): `gathers_worker.py PLAN.json OUT`, a list of [name, recipe, overrides].

`late`: the same training with gathers that bring nothing before somebody waits for them, and spoil the weights until then: whatever
computes without waiting is not a number. `order`: of the buckets, which are still under way when each part of the network computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bd3_scale import recipe as recipes
from bd3_scale.costs import sizes
from bd3_scale.distributed import layout
from bd3_scale.engines.build import build_engine
from bd3_scale.launcher import launched
from bd3_scale.objectives.table import ObjectiveSchedule
from bd3_scale.optimizers.ema import ExponentialAverage
from bd3_scale.rules.validate import validate
from tests.distributed.worlds import join, leave, plan, write

sizes.SMALLEST_BUCKET = 1000
VOCABULARY = 259


class Late:
    """A gather that has not begun."""

    def __init__(self, bucket: Any) -> None:
        self.bucket = bucket
        (data,) = (one.param_data for one in bucket.buckets)
        self.own = data.chunk(bucket.intra_distributed_optimizer_instance_size)[bucket.intra_distributed_optimizer_instance_rank]
        kept = self.own.clone()
        data.fill_(float("nan"))
        self.own.copy_(kept)

    def wait(self) -> None:
        (data,) = (one.param_data for one in self.bucket.buckets)
        dist.all_gather_into_tensor(data, self.own.clone(), group=self.bucket.intra_distributed_optimizer_instance_group)


class Case:
    """An engine and the rows that it trains on."""

    def __init__(self, path: str, overrides: list[str]) -> None:
        self.recipe = recipes.load(path, overrides)
        validate(self.recipe, launched().world_size, "cpu")
        self.here = layout.start(self.recipe.parallel, "cpu")
        self.objective = ObjectiveSchedule(self.recipe.objective, self.recipe.model.context, VOCABULARY - 1).at(0)
        self.engine: Any = build_engine(self.recipe, self.here, VOCABULARY, VOCABULARY - 1)
        self.buckets = [bucket for chunk in self.engine.chunks for bucket in chunk.bucket_groups]

    def inputs(self, step: int) -> list[Any]:
        batch, rows = self.recipe.training.global_batch, self.recipe.micro_batch(self.here.data)
        share = batch // self.here.data
        tokens = np.random.default_rng(step).integers(0, VOCABULARY - 1, (batch, self.recipe.model.context))
        slots = np.arange(share) + self.here.data_rank * share
        parts = [slots[at : at + rows] for at in range(0, share, rows)]
        return [self.objective.training_inputs(tokens[part], part, step, 0, batch) for part in parts]

    def step(self, step: int) -> list[float]:
        tokens = self.recipe.training.global_batch * self.objective.scored_tokens_per_row
        loss = self.engine.forward_backward(self.inputs(step), tokens)
        return [float(loss), float(self.engine.step(1e-2))]

    def late(self) -> None:
        for bucket in self.buckets:
            bucket.start_param_sync = lambda bucket=bucket: setattr(bucket, "param_gather_handle", Late(bucket))


def training(case: Case) -> list[float]:
    """Losses and norms of steps, and validations with averaged weights right after one."""
    average = ExponentialAverage(case.engine.masters, 0.5, case.engine.publish, case.engine.settle)
    found: list[float] = []
    for step in range(3):
        found += case.step(step)
        average.update(step + 1)
        with average.swapped():
            found += [float(nll.sum()) for nll in case.engine.evaluate(case.inputs(step)) if nll is not None]
        found += case.step(100 + step)
    for fragment in case.engine.fragments():  # a checkpoint is loaded right after a step
        fragment.value.mul_(0.5)
    case.engine.resume(3)
    return [*found, *case.step(200), *case.step(201)]


def order(case: Case) -> dict[str, Any]:
    """Buckets under way after a step, and when each block computes: [of its own, of others]."""
    case.step(0)
    bucket_of = {parameter: bucket for bucket in case.buckets for parameter in bucket.params}
    after = sum(bucket.param_gather_handle is not None for bucket in case.buckets)
    seen: list[list[int]] = []

    def look(block: torch.nn.Module, arguments: Sequence[Any]) -> None:
        own = {bucket_of[parameter] for parameter in block.parameters()}
        waiting = [bucket for bucket in case.buckets if bucket.param_gather_handle is not None]
        seen.append([sum(bucket in own for bucket in waiting), sum(bucket not in own for bucket in waiting)])

    hooks = [block.register_forward_pre_hook(look) for chunk in case.engine.transformers for block in chunk.blocks.values()]
    case.engine.forward_backward(case.inputs(1)[:1], 1)
    for hook in hooks:
        hook.remove()
    case.engine.step(1e-2)
    # What is compiled has no hooks of ours.
    hooked = sum(
        len(module._forward_pre_hooks)
        for chunk in case.engine.transformers
        for block in chunk.blocks.values()
        for module in block.modules()
    )
    # Somebody forgets to wait.
    case.engine.transformers[0].__dict__.pop("_layers")
    try:
        case.step(3)
        noticed = ""
    except AssertionError as error:
        noticed = str(error)
    return {"after": after, "buckets": len(case.buckets), "seen": seen, "hooked": hooked, "noticed": noticed}


def main() -> None:
    results: dict[str, Any] = {}
    for number, (name, path, overrides) in enumerate(plan()):
        for kind in ("as it is", "late", "order"):
            join(f"{number}.{kind}")
            case = Case(path, overrides)
            if kind == "late":
                case.late()
            results[f"{name}: {kind}"] = case.here.all_gather(order(case) if kind == "order" else training(case))
            case.engine.close()
            leave()
    write(results)


if __name__ == "__main__":
    main()
