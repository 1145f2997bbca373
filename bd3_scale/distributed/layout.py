"""The world as tensor x context x data x pipeline ranks: process groups, who reads what, who writes, the device.

megatron.core.parallel_state is the only source of process groups, on gloo and on NCCL. Ranks are numbered with the tensor
rank fastest, then context, data, pipeline: tensor peers, which exchange the most, are neighbours on a node, and stages,
which exchange the least, are farthest apart. Invariants: all ranks of one data-parallel replica have the same `data_rank`
and so read the same rows; rank 0 is the leader, the only one that logs; a single process needs no launcher, no port and
no network.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from bd3_scale.distributed import megatron_on_cpu
from bd3_scale.distributed.rendezvous import meet, reach
from bd3_scale.distributed.waiting import waiting_for
from bd3_scale.files import raise_file_limit
from bd3_scale.launcher import launched
from bd3_scale.megatron_core import parallel_state
from bd3_scale.recipe.schema import ParallelConfig

ORDER = "tp-cp-ep-dp-pp"
"""megatron-core's words, fastest first (ep, experts, is always 1)."""


@dataclass(frozen=True)
class Layout:
    """Where this rank stands. Also the `communicator` of the checkpoint code: rank, world_size, all_gather, barrier."""

    rank: int
    world_size: int
    device: torch.device
    tensor: int
    tensor_rank: int
    pipeline: int
    pipeline_rank: int
    data: int
    """Data-parallel replicas."""
    data_rank: int
    context: int = 1
    """Ranks over which the rows of a replica are divided by positions."""
    context_rank: int = 0
    local_rank: int = 0
    """Among the ranks of this host."""
    world: str = ""
    """A name that no other world of this job has; empty where the world was not joined by `start`."""

    @property
    def is_main_rank(self) -> bool:
        """The one rank that logs, prints and decides."""
        return self.rank == 0

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        return [value] if self.world_size == 1 else all_gather(value)

    def broadcast(self, value: Any) -> Any:
        """The leader's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    @property
    def states(self) -> int:
        """Ranks over which gradients are summed, and over which ZeRO divides: those of all replicas at one place in theirs, whatever
        their positions."""
        return self.data * self.context

    @property
    def state_rank(self) -> int:
        """Among them."""
        return self.data_rank * self.context + self.context_rank

    @property
    def scores(self) -> bool:
        """Whether this rank has answers that no other has: the first tensor rank of the last stage."""
        return self.tensor_rank == 0 and self.pipeline_rank == self.pipeline - 1

    @property
    def reports_for_replica(self) -> bool:
        """Whether this rank speaks for its replica: of those that score, the first."""
        return self.scores and self.context_rank == 0

    @property
    def replicas_of_this_host(self) -> range:
        """The data ranks that read on this host; all where its ranks belong to several stages."""
        ranks, width = launched().ranks_of_this_host(self.rank), self.world_size // (self.pipeline * self.data)
        (first_stage, first), (last_stage, last) = (divmod(rank // width, self.data) for rank in (ranks[0], ranks[-1]))
        return range(first, last + 1) if first_stage == last_stage else range(self.data)

    def sum_of_replicas(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the replicas, on every rank, of what the ranks that score hold."""
        if self.world_size > 1:
            value = value if self.scores else torch.zeros_like(value)
            dist.all_reduce(value)
        return value

    def sum_of_context(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that divide the rows of this one, on each of them; in place."""
        if self.context > 1:
            dist.all_reduce(value, group=parallel_state.get_context_parallel_group())
        return value


def all_gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank of the world that has been joined."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def start(config: ParallelConfig, device: str, joined: Callable[[], object] = lambda: None) -> Layout:
    """Join the world that torchrun started (or a world of one) and make the groups of the layout. `joined`: called between the two."""
    told = launched()
    os.environ.setdefault("LOCAL_RANK", str(told.local_rank))  # DeepSpeed reads it
    world = ""
    place = torch.device(device, told.local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        if config.tensor > 1 and config.resolved_engine != "fsdp":
            # Kernels start in the order in which they are launched: megatron-core's collectives before the products that hide them.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(place)
    timeout = datetime.timedelta(seconds=config.timeout)
    for default in ("default_pg_timeout", "default_pg_nccl_timeout"):  # of the groups that DeepSpeed and torch make, who ask nobody
        setattr(dist.distributed_c10d, default, timeout)
    raise_file_limit()
    # A group of gloo would connect each rank to every other, 8 groups of all ranks a thousand sockets at 128 ranks: this way as needed.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if not dist.is_initialized():
        # On CUDA, objects and barriers of the host still go through gloo.
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        if told.world_size == 1 and not told.numbered:
            store: dist.Store = dist.HashStore()
            rank, world_size = 0, 1
        else:
            store, rank, world_size = reach(config.timeout)
        world = meet(dist.PrefixStore("bd3_scale", store), rank, world_size, config.timeout)
        store = dist.PrefixStore(f"bd3_scale/{world}", store)
        whom = f"all {world_size} ranks are here, but rank {rank} has no connection to each of them; see GLOO_SOCKET_IFNAME, and NCCL's"
        with waiting_for(lambda: whom, speaks=rank == 0):
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
            dist.barrier()  # a network over which ranks cannot meet is found here
    joined()
    if device == "cpu":
        megatron_on_cpu.install()
    replicas = dist.get_world_size() // (config.tensor * config.pipeline * config.context)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_stages if config.virtual_stages > 1 else None,
        context_parallel_size=config.context,
        order=ORDER,
        # Copies of what ZeRO divides: megatron-core makes the groups inside of one and across them.
        num_distributed_optimizer_instances=replicas // config.shard if config.shard else 1,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=config.timeout / 60,
    )
    return replace(current(config, place), world=world)


def current(config: ParallelConfig, device: torch.device) -> Layout:
    """Where this rank stands in the world that has been joined."""
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        tensor=config.tensor,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=config.pipeline,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        context=config.context,
        context_rank=parallel_state.get_context_parallel_rank(),
        local_rank=launched().local_rank,
    )


def stop() -> None:
    """Leave the world in order; safe to call twice. A world may be joined anew afterwards."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        # DeepSpeed, where it was used, holds groups of its own.
        comm = sys.modules.get("deepspeed.comm")
        destroy = comm.destroy_process_group if comm is not None and comm.is_initialized() else dist.destroy_process_group
        destroy()
