"""Worlds of many ranks in one process (torch's fake process group): `rehearsal_worker.py PLAN.json OUT`.

A plan is a list of [kind, name, recipe, world size, overrides]. `traffic`: the payload of every collective of a step of the real engine,
as the dispatcher sees it, beside what `costs/communication.py` says. `rehearse`: what `plan --rehearse` says; `broken`: the same, while a
stage hands on one row too few.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_scale import recipe as recipes
from bd3_scale.costs.communication import step_traffic
from bd3_scale.engines.build import build_engine
from bd3_scale.errors import UserError
from bd3_scale.model.transformer import Transformer
from bd3_scale.planning import rehearsal
from bd3_scale.planning.cluster_plan import ClusterPlan, cluster_plan
from bd3_scale.planning.devices import device_named
from bd3_scale.rules.validate import validate

VOCABULARY = 2003
OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send",
}
CONTROL = 64
"""Bytes up to which a collective is a norm, a loss or a flag, which the formula leaves out."""


class Count(TorchDispatchMode):
    """Payload by (group, operation), and how often the host reads a number of the device (`item`), for which it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.bytes: Counter[str] = Counter()
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.reads += function.__name__.startswith("_local_scalar_dense")
        if function.namespace == "c10d":
            self._count(function.__name__.split(".")[0], arguments)
        return function(*arguments, **(keywords or {}))

    def _count(self, name: str, arguments: Any) -> None:
        group = next(one for one in arguments if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type()))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        # The whole tensor is the larger side; of a send there is one side.
        payload = max(_size(one) for one in arguments)
        if len(ranks) == 1 or payload <= CONTROL or name in ("recv_", "barrier"):
            return
        if name not in OPERATIONS:
            self.unknown.add(name)
        group = "pipeline" if name == "send" else _group(ranks)
        group = "matrices" if name == "alltoall_base_" and group != "context" else group
        self.bytes[f"{group} {OPERATIONS.get(name)}"] += payload


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_size(one) for one in value) if isinstance(value, (list, tuple)) else 0


def _group(ranks: list[int]) -> str:
    groups = {
        "data": parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True),
        "copies": parallel_state.get_inter_distributed_optimizer_instance_group(check_initialized=False),
        "context": parallel_state.get_context_parallel_group(),
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "embedding": parallel_state.get_embedding_group(check_initialized=False),
    }
    if groups["copies"] is None:  # one copy, and maybe another order of the same ranks
        groups["data"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    members = {name: dist.get_process_group_ranks(group) for name, group in groups.items() if isinstance(group, dist.ProcessGroup)}
    return next((name for name, own in members.items() if own == ranks), str(ranks))


def traffic(path: str, world_size: int, overrides: list[str], rank: int) -> dict[str, Any]:
    recipe = recipes.load(path, overrides)
    validate(recipe, world_size, "cpu")
    cluster = ClusterPlan(recipe, world_size, device_named("cpu", world_size), VOCABULARY)
    with rehearsal.fake_world(cluster, rank) as layout, contextlib.redirect_stdout(io.StringIO()):
        objective = rehearsal._objective(cluster, 0)
        engine = build_engine(recipe, layout, VOCABULARY, VOCABULARY - 1)
        batch, rows = recipe.training.global_batch, cluster.shares().micro_batch
        share = batch // layout.data
        part = rehearsal._share(cluster, layout)
        inputs = [part.of(rehearsal._inputs(objective, rows, VOCABULARY, 0, start, batch)) for start in range(0, share, rows)]
        for _ in range(2):  # in the first, ZeRO 3 only learns what is needed when
            with Count() as count:
                engine.forward_backward(inputs, batch * objective.scored_tokens_per_row)
                engine.step(1e-3)
        selected = [len(one.selected) for one in inputs]
        formula: Counter[str] = Counter()
        for number in selected:  # so that the formula has each micro-batch as it is
            one = replace(cluster.batch(), selected=number)
            for moved in step_traffic(
                recipe.training,
                recipe.parallel,
                cluster.stages_of(layout.pipeline_rank),
                VOCABULARY,
                one,
                layout.data,
                len(inputs),
                layout.pipeline_rank,
            ):
                formula[f"{moved.group} {moved.operation}"] += moved.bytes
        engine.close()
    assert not count.unknown, count.unknown
    # With two stages the group of the embedding is that of the pipeline.
    moved = {name: number // len(inputs) for name, number in formula.items()}
    return {"counted": merged(count.bytes), "formula": merged(moved), "reads": count.reads}


def merged(found: dict[str, int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for name, number in found.items():
        total[name.replace("embedding", "pipeline")] += number
    return dict(total)


def rehearse(path: str, world_size: int, overrides: list[str], broken: bool) -> dict[str, Any]:
    forward = Transformer.forward

    def short(self: Transformer, *arguments: Any) -> Any:
        found = forward(self, *arguments)
        return found if self.last else found[:-1]

    try:
        recipe = recipes.load(path, overrides)
        with mock.patch.object(Transformer, "forward", short) if broken else contextlib.nullcontext():
            # A tokenizer of the user's own is not here: BERT's has as many ids.
            vocabulary = None if recipe.data.tokenizer in ("gpt2", "bytes") else 30523
            lines = rehearsal.rehearse(cluster_plan(recipe, world_size, device_named("h100", world_size), vocabulary))
    except UserError as error:
        assert not dist.is_initialized()
        return {"error": str(error), "kind": type(error).__name__}
    return {"lines": lines}


def main() -> None:
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    results = {}
    for kind, name, path, world_size, overrides, rank in plan:
        if kind == "traffic":
            results[name] = traffic(path, world_size, overrides, rank)
        else:
            results[name] = rehearse(path, world_size, overrides, kind == "broken")
        print(name, results[name], flush=True)
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
