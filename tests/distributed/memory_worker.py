"""Measures what every rank holds, beside what the plan says: `memory_worker.py PLAN.json OUT`, a list of [name, overrides of the recipe].

State: the storages of all tensors that are alive between two micro-batches and after the last, when gradients are there and
activations are gone, without those that were there before the engine was made. Activations: what the forwards of the second step made
and something still holds when a forward ends; in a pipeline the most of it, else after the first forward, before gradients come.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bd3_scale import recipe as recipes
from bd3_scale.costs.activation_memory import exchange_bytes
from bd3_scale.costs.parameter_shapes import units_of, whole
from bd3_scale.costs.sizes import PERSISTENT
from bd3_scale.costs.state_memory import state_bytes
from bd3_scale.distributed import layout
from bd3_scale.distributed.context_share import ContextShare
from bd3_scale.engines.build import build_engine
from bd3_scale.engines.engine import Engine
from bd3_scale.launcher import launched
from bd3_scale.objectives.network_inputs import NetworkInputs
from bd3_scale.objectives.table import ObjectiveSchedule, selected_multiple
from bd3_scale.optimizers.ema import ExponentialAverage
from bd3_scale.planning.cluster_plan import ClusterPlan
from bd3_scale.planning.devices import device_named
from bd3_scale.planning.estimate import rank_memory
from bd3_scale.rules.validate import validate
from tests.alive import Alive
from tests.distributed.worlds import results_of_ranks

VOCABULARY = 2003


def storages() -> dict[int, int]:
    """Address -> bytes of every tensor storage that something holds."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        try:
            tensors = [thing] if isinstance(thing, torch.Tensor) else []
        except ReferenceError:
            continue
        for tensor in tensors:
            for one in (tensor, tensor.grad if tensor.is_leaf else None, getattr(tensor, "main_grad", None)):
                one = getattr(one, "_local_tensor", one)  # of FSDP's shards
                if one is not None and one.device.type == "cpu":
                    storage = one.untyped_storage()
                    if storage.nbytes():
                        found[storage.data_ptr()] = storage.nbytes()
    return found


def alive(before: dict[int, int]) -> int:
    time.sleep(0.2)  # gloo's threads wake whoever waits for a collective before they let go of its tensors
    return sum(size for address, size in storages().items() if address not in before)


def measure(path: str, overrides: list[str]) -> dict[str, int]:
    recipe = recipes.load(path, overrides)
    world_size = launched().world_size
    validate(recipe, world_size, "cpu")
    here, fsdp = layout.start(recipe.parallel, "cpu"), recipe.parallel.resolved_engine == "fsdp"
    multiple, before = selected_multiple(recipe.parallel, "cpu"), storages()
    context = ContextShare(here.context_rank, here.context, multiple, recipe.parallel.context_exchange == "ring")
    objective = ObjectiveSchedule.of(recipe, VOCABULARY - 1).at(0)
    engine: Engine = build_engine(recipe, here, VOCABULARY, VOCABULARY - 1)
    average = ExponentialAverage(engine.masters, 0.9, engine.publish, engine.settle)
    most, step, held = 0, 0, []
    move = NetworkInputs.to

    def to(self: NetworkInputs, *where: Any, **how: Any) -> NetworkInputs:  # an engine's first act on a micro-batch
        # At the second micro-batch of the second step, when Adam's moments are there; in a pipeline others are under way then.
        # Not of FSDP: gradients are on their way then, and what it has gathered is there until the step itself.
        held.append(alive(before) if here.pipeline == 1 and not fsdp and step == 1 and len(held) == 1 else 0)
        return move(self, *where, **how)

    NetworkInputs.to = to
    batch = recipe.training.global_batch
    share = batch // here.data
    rows = np.random.default_rng(0).integers(0, VOCABULARY - 1, (share, recipe.model.context))

    def run() -> None:
        parts = [slice(at, at + recipe.parallel.micro_batch) for at in range(0, share, recipe.parallel.micro_batch)]
        slots = np.arange(share) + here.data_rank * share
        inputs = [context.of(objective.training_inputs(rows[part], slots[part], step, 0, batch)) for part in parts]
        held.clear()
        engine.forward_backward(inputs, batch * (recipe.model.context - 1))

    for step in range(2):
        run()
        if step == 1:
            most = max([*held, alive(before)])
        engine.step(1e-3)
        average.update(step + 1)
    NetworkInputs.to = move
    step = 2
    activations = under_way(engine, here.pipeline, run)
    cluster = ClusterPlan(recipe, world_size, device_named("cpu", world_size), VOCABULARY)
    planned = rank_memory(cluster, here.pipeline_rank)
    stages = cluster.stages_of(here.pipeline_rank)
    buckets = state_bytes(
        recipe.model, recipe.training, recipe.parallel, stages, VOCABULARY, here.states, "cpu", cluster.precision == "bf16"
    ).buckets
    expected = planned.activations + exchange_bytes(cluster.batch(), recipe.parallel, here.pipeline_rank)
    if fsdp:  # the weights that are still gathered where a forward ends
        chunks = [units_of(recipe.model, VOCABULARY, layers, here.tensor) for layers in stages]
        groups = [group for chunk in chunks for group in (chunk.groups if recipe.parallel.zero == 2 else [chunk.rest])]
        kept = recipe.parallel.zero == 2 or here.pipeline == 1
        expected += cluster.batch().weight * sum(whole(group, cluster.sharers) for group in groups) * kept
        if here.pipeline > 1:  # the fullest forward follows a backward, with its gradients and what it sent last
            expected += planned.gradients + sum(4 * whole(chunk.embedding or chunk.rest, cluster.sharers) for chunk in chunks)
    elif recipe.parallel.zero == 3:  # the weights that were gathered for the forward
        sizes = [size for layers in stages for size in units_of(recipe.model, VOCABULARY, layers, here.tensor).sizes]
        expected += cluster.batch().weight * sum(size for size in sizes if size > PERSISTENT)
    engine.close()
    return {"state": most, "planned_state": planned.state + buckets, "activations": activations, "planned_activations": expected}


def under_way(engine: Any, pipeline: int, run: Callable[[], None]) -> int:
    """Bytes that the forwards of a step keep, at the fullest end of a forward."""
    networks = engine.transformers if hasattr(engine, "transformers") else [engine.engine.module]
    known = [tensor for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"]
    found: list[int] = []
    with Alive(known) as made:
        hooks = [network.register_forward_hook(lambda *unused: found.append(made.bytes())) for network in networks]
        run()
    for hook in hooks:
        hook.remove()
    return max(found) if pipeline > 1 else found[0]


def main() -> None:
    results_of_ranks(measure)


if __name__ == "__main__":
    main()
