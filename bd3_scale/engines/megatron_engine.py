"""Training under megatron-core's gradient buffers and distributed optimizer, by its schedules (`pipeline_engine.py`).

ZeRO 0 keeps everything on every data-parallel rank; ZeRO 1 divides masters and moments over them (megatron-core's
DistributedOptimizer). Gradients are summed in fp32, bucket by bucket behind the backward of the last micro-batch; updated
weights are gathered behind the next forward (`gathers.py`). One data-parallel rank exchanges nothing.

Invariants: as in `pipeline_engine.py` and `gathers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from bd3_scale.costs.sizes import bucket_elements
from bd3_scale.distributed import megatron_on_cpu
from bd3_scale.distributed.layout import Layout
from bd3_scale.engines.engine import MasterSlice, master_slices, owns
from bd3_scale.engines.gathers import Gathers
from bd3_scale.engines.pipeline_engine import ScheduledEngine, Stage, mark_shared
from bd3_scale.megatron_core import parallel_state
from bd3_scale.model.transformer import Transformer
from bd3_scale.optimizers.adamw import SkippingAdamW
from bd3_scale.optimizers.settings import OptimizerSettings


class MegatronEngine(ScheduledEngine):
    """This rank's chunks of the network (one, or one per virtual stage) under megatron-core; `initialise` gives them their weights."""

    def __init__(self, chunks: Sequence[Transformer], layout: Layout, settings: OptimizerSettings, *, zero: int, bf16: bool) -> None:
        self.layout, self.settings, self.zero = layout, settings, zero
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        # Under ZeRO 1 the weights become views of buffers on the device: no other copy of them is made there.
        self.transformers = [chunk.to(self.dtype) if zero == 1 else chunk.to(layout.device, self.dtype) for chunk in chunks]
        # Each shared parameter gets a bucket of its own, so that every stage divides it alike (ZeRO 1).
        mark_shared(self.transformers, layout.pipeline)
        if layout.device.type == "cpu":
            megatron_on_cpu.name_types_as_on_cuda(p for chunk in chunks for p in chunk.parameters())
        self.config = self.schedule_config(layout, self.dtype)
        buffers = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=layout.states > 1,
            overlap_param_gather=zero == 1,
            use_distributed_optimizer=zero == 1,
            bucket_size=bucket_elements(sum(p.numel() for chunk in chunks for p in chunk.parameters()), layout.states),
        )
        self.chunks: list[Any] = [
            DistributedDataParallel(self.config, buffers, Stage(chunk, self.config), disable_bucketing=index > 0)
            for index, chunk in enumerate(self.transformers)
        ]
        for chunk in self.transformers:
            chunk.to(layout.device)  # what is no parameter
        self.config.no_sync_func = [chunk.no_sync for chunk in self.chunks] if self.interleaved else self.chunks[0].no_sync
        self.distributed = self._distributed_optimizer() if zero == 1 else None
        self.gathers = Gathers(self.chunks, self.transformers) if zero == 1 else None
        self.named = [(name, p) for chunk in self.transformers for name, p in chunk.named_parameters()]
        self.adam = self._make_adam()
        self.slices = list(self._find_slices())
        self.bind_optimizer(self._holders)
        self.owned = [master for master, parameter in self._masters if owns(parameter, layout)]

    # -- a step --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def finish_reduction(self) -> None:
        if self.layout.states > 1:
            for chunk in self.chunks:
                chunk.finish_grad_sync()

    def gradient(self, parameter: Any) -> Tensor:
        gradient: Tensor = parameter.main_grad
        return gradient

    def prepare_step(self) -> dist.ProcessGroup | None:
        assert self.gathers is None or not self.gathers.under_way, "a part of the network did not wait for its weights"
        if self.distributed is None:
            for parameter in self.masters:
                parameter.grad = parameter.main_grad  # type: ignore[attr-defined]
        else:
            self.distributed.prepare_grads()
        return self._holders

    @property
    def _holders(self) -> Any:
        """The ranks that together hold one copy of all masters: under ZeRO 1 they are divided over the data-parallel ranks, too."""
        return parallel_state.get_model_parallel_group() if self.distributed is None else dist.group.WORLD

    # -- the state -----------------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> tuple[int, int]:
        return (self.layout.state_rank, self.layout.states) if self.zero == 0 else (0, 1)

    def settle(self) -> None:
        if self.gathers is not None:
            self.gathers.finish()

    def publish(self) -> None:
        self.settle()
        self.spread()
        self.settle()

    @torch.no_grad()
    def spread(self) -> None:
        if self.distributed is None:
            return
        if self.dtype != torch.float32:
            self.distributed._copy_main_params_to_model_params()
        if self.layout.states > 1:
            assert self.gathers is not None
            self.gathers.start()

    def close(self) -> None:
        if self.gathers is not None:
            self.gathers.close()
        for chunk in self.chunks:
            chunk.grad_accs.clear()

    # -- how megatron-core wants it ------------------------------------------------------------------------------------

    def _distributed_optimizer(self) -> Any:
        betas, epsilon = self.settings.betas, self.settings.epsilon
        config = OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            weight_decay=self.settings.weight_decay,
            adam_beta1=betas[0],
            adam_beta2=betas[1],
            adam_eps=epsilon,
            clip_grad=0.0,
            params_dtype=self.dtype,
            bf16=self.dtype == torch.bfloat16,
            use_distributed_optimizer=True,
        )
        (optimizer,) = get_megatron_optimizer(config, self.chunks, use_gloo_process_groups=False).chained_optimizers
        return optimizer

    def _make_adam(self) -> SkippingAdamW:
        """The recipe's optimizer on the masters, whatever else is installed (megatron-core would take what it finds)."""
        if self.distributed is None:
            self._masters = [(p, p) for _, p in self.named]
        else:
            optimizer = self.distributed
            pairs = (
                (optimizer.shard_fp32_groups, optimizer.model_fp32_groups),
                (optimizer.shard_fp32_from_float16_groups, optimizer.model_float16_groups),
            )
            self._masters = [
                pair
                for shards, models in pairs
                for shard_group, model_group in zip(shards, models, strict=True)
                for pair in zip(shard_group, model_group, strict=True)
            ]
        self.masters = [master for master, _ in self._masters]
        adam = self.settings.build(self.settings.groups(), self.layout.device)
        # Afterwards, because megatron-core's masters of fp32 weights are views, which torch takes no optimizer for.
        names = {id(parameter): name for name, parameter in self.named}
        for master, parameter in self._masters:
            group = self.settings.group_of(names[id(parameter)], parameter.dim())
            adam.param_groups[group]["params"].append(master)
        if self.distributed is not None:
            self.distributed.optimizer = adam
        return adam

    def _find_slices(self) -> Iterator[MasterSlice]:
        names = {id(parameter): name for name, parameter in self.named}
        for index, (_, parameter) in enumerate(self._masters):
            start, stop = 0, parameter.numel()
            if self.distributed is not None:
                part = self.distributed._get_model_param_range_map(parameter)["param"]
                start, stop = part.start, part.end
            yield from master_slices(names[id(parameter)], parameter, self.layout, start, stop, index, 0)
