"""One small interface over DeepSpeed ZeRO 0-3: forward-backward, step, and the full-precision state by name.

The loop, the EMA and the checkpoints see a rank's state as a list of flat fp32 tensors (`masters`, with their Adam
moments) and a list of `Place`s that says which region of which canonical parameter lies where in them. Each ZeRO stage
differs only in how that list is made and in how masters are published to the weights that compute.

Invariants: the gradient is the gradient of sum(weighted nll) / (global data tokens of the step), whatever the number of
ranks and micro-batches; parameters carry their canonical names; nothing here copies the whole state.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from bd3_scale.checkpoint.state import Fragment, Region
from bd3_scale.model.layers import parameter_partition
from bd3_scale.parallel.layout import Layout

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Place:
    """`masters[master][offset : offset + numel]` holds `region` of the canonical parameter `name`."""

    name: str
    region: Region
    master: int
    offset: int

    @property
    def numel(self) -> int:
        return self.region.stop - self.region.start


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW. `clip`: largest global gradient norm, 0 for none; weight decay acts on matrices only."""

    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    clip: float


class MegatronGroups:
    """megatron.core.parallel_state in the words DeepSpeed asks its `mpu` in (it no longer has three of the names)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_group(self) -> Any:
        return parallel_state.get_tensor_model_parallel_group()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return torch.distributed.get_process_group_ranks(parallel_state.get_data_parallel_group())


class ZeroEngine:
    """A model under DeepSpeed ZeRO. Make it last: tensor parallelism, recomputation and compile come before."""

    def __init__(
        self, model: nn.Module, layout: Layout, settings: OptimizerSettings, *, zero: int, micro_batch: int, accumulation: int, bf16: bool
    ) -> None:
        deepspeed = _import_deepspeed(layout.device.type)
        self.layout, self.zero, self.settings = layout, zero, settings
        self._shapes = {name: _full_shape(parameter, layout) for name, parameter in model.named_parameters()}
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        plain = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.epsilon, fused=layout.device.type == "cuda")
        config = _deepspeed_config(model, zero, micro_batch, accumulation, 0.0 if zero == 0 else settings.clip, bf16, layout.device.type)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=MegatronGroups())
        self.masters = self._find_masters()
        self.places = list(self._find_places())

    # -- a step --------------------------------------------------------------------------------------------------------

    def forward_backward(self, micro_batches: Sequence[Any], tokens: int) -> Tensor:
        """Accumulate the gradient of this rank's share. `tokens`: data tokens of the step over all ranks and micro-batches.
        Returns this rank's part of the train loss (fp32 scalar on the device, no host sync)."""
        self.engine.train()
        total = torch.zeros((), device=self.layout.device)
        for inputs in micro_batches:
            weighted, _ = self.engine(inputs.to(self.layout.device, non_blocking=True))
            # DeepSpeed averages over the data-parallel ranks: undo it, the sum is already divided by all tokens.
            loss = weighted * (self.layout.data / tokens)
            self.engine.backward(loss, scale_wrt_gas=False)
            total += weighted.detach() / tokens
            if inputs is not micro_batches[-1]:
                self.engine.step()
        return total

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update, and return the global gradient norm before clipping."""
        for group in self._inner.param_groups:
            group["lr"] = learning_rate
        if self.zero == 0:
            # DeepSpeed neither reports nor clips without a sync here; the gradients are whole on every rank.
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if self.settings.clip:
                torch.nn.utils.clip_grads_with_norm_(self.engine.module.parameters(), self.settings.clip, norm)
            self.engine.step()
            return norm
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    @torch.no_grad()
    def evaluate(self, inputs: Any) -> Tensor:
        """nll fp32 [n] of the selected positions, without dropout."""
        self.engine.eval()
        _, nll = self.engine(inputs.to(self.layout.device, non_blocking=True))
        return nll

    # -- the state -----------------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> tuple[int, int]:
        """(index, count) of this rank among those that hold the same state."""
        return (self.layout.data_rank, self.layout.data) if self.zero == 0 else (0, 1)

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> full shape of every parameter."""
        return dict(self._shapes)

    def moments(self) -> dict[str, list[Tensor]]:
        """Adam's moments, beside the masters; made as zeros where no step has been taken."""
        state = self._inner.state
        for master in self.masters:
            if "exp_avg" not in state[master]:
                # On the device for fused AdamW, else on the host: where torch's AdamW itself would make it.
                step = torch.zeros((), dtype=torch.float32, device=master.device if master.is_cuda else "cpu")
                state[master].update(step=step, exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
        return {kind: [state[master][kind] for master in self.masters] for kind in MOMENTS}

    def fragments(self, ema: Sequence[Tensor] | None = None) -> list[Fragment]:
        """Live views of all that this rank holds: weights, moments and, where given, EMA tensors parallel to `masters`."""
        kinds: dict[str, Sequence[Tensor]] = {"weight": self.masters, **self.moments()}
        if ema is not None:
            kinds["ema"] = ema
        return [
            Fragment(kind, place.name, place.region, flats[place.master].detach().view(-1)[place.offset : place.offset + place.numel])
            for kind, flats in kinds.items()
            for place in self.places
        ]

    def resume(self, step: int) -> None:
        """After the fragments were filled from a checkpoint of `step`: set Adam's clock, publish the weights, and make sure
        that no hyper-parameter was lost on the way."""
        self.moments()
        for master in self.masters:
            self._inner.state[master]["step"].fill_(step)
        self.publish()
        decays = [group["weight_decay"] for group in self._inner.param_groups]
        assert decays == [self.settings.weight_decay, 0.0], f"DeepSpeed lost the weight decay of the groups: {decays}"

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the weights that compute (and to the other ranks, where weights are whole)."""
        if self.zero in (1, 2):
            self.optimizer.update_lp_params()
        elif self.zero == 3:
            # Small weights stay gathered between steps, and gathering skips what is: let go of the old values first.
            self.optimizer._partition_all_parameters()
            for group in range(len(self.masters)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if self.optimizer.persistent_parameters:
                self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)

    # -- how DeepSpeed keeps it ----------------------------------------------------------------------------------------

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self.optimizer if self.zero == 0 else self.optimizer.optimizer

    def _find_masters(self) -> list[Tensor]:
        if self.zero == 0:
            return list(self.engine.module.parameters())
        return self.optimizer.fp32_partitioned_groups_flat if self.zero == 3 else self.optimizer.single_partition_of_fp32_groups

    def _find_places(self) -> Iterator[Place]:
        for index, (name, parameter) in enumerate(self.engine.module.named_parameters()):
            if self.zero == 0:
                yield Place(name, self._region(name, parameter, 0, parameter.numel()), index, 0)
            elif self.zero == 3:
                group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                start = size * parallel_state.get_data_parallel_rank()
                stop = min(start + size, parameter.ds_numel)  # the last rank's share is padded
                if start < stop:
                    yield Place(name, self._region(name, parameter, start, stop), group, offset)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                region = self._region(name, parameter, start, start + size)
                yield Place(name, region, mapping.param_group_index, mapping.hp_fragment_address.start)

    def _region(self, name: str, parameter: Tensor, start: int, stop: int) -> Region:
        shape = self._shapes[name]
        dimension, _ = parameter_partition(parameter)
        if dimension < 0:
            return Region(shape, 0, 0, shape[0], start, stop)
        size = shape[dimension] // self.layout.tensor
        return Region(shape, dimension, self.layout.tensor_rank * size, size, start, stop)


def _full_shape(parameter: Tensor, layout: Layout) -> tuple[int, ...]:
    dimension, _ = parameter_partition(parameter)
    return tuple(size * layout.tensor if axis == dimension else size for axis, size in enumerate(parameter.shape))


def _import_deepspeed(device: str) -> Any:
    # Its shared-memory operator is built by a C++ compiler at the first start, for inference only: never build it.
    # It calls collectives by names that newer torch has renamed, and warns about that on every call.
    os.environ.setdefault("DS_ACCELERATOR", device)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _deepspeed_config(
    model: nn.Module, zero: int, micro_batch: int, accumulation: int, clip: float, bf16: bool, device: str
) -> dict[str, Any]:
    # Buckets are allocated at their full size: never larger than what there is to send.
    numel = sum(parameter.numel() for parameter in model.parameters())
    bucket = min(numel, 200_000_000)
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero,
            "overlap_comm": device == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket // 4,
        },
        "bf16": {"enabled": bf16},
    }


def apply_outside(blocks: Iterable[nn.Module], *, recompute: bool, compile: bool) -> None:
    """What surrounds the layers, in this order: activation checkpointing, then compile. (Tensor before, ZeRO after.)"""
    for block in blocks:
        if recompute:
            block.forward = _recomputed(block.forward)  # type: ignore[method-assign]
        if compile:
            block.compile()


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        # Dropout is keyed, not drawn: a recomputation needs no generator state.
        return torch.utils.checkpoint.checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return run
