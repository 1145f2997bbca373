"""Training under DeepSpeed ZeRO 0-3, with or without tensor parallelism; one stage.

Each ZeRO stage differs in how its flat fp32 masters are found and in how they are published to the weights that compute.
Invariants: as in `engine.py`; a parameter that tensor ranks hold whole but of whose gradient each computes a part
(`sequence_parallel`) has its gradient summed over them before DeepSpeed sees it. DeepSpeed's version is pinned, since it is patched by
names of one version.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bd3_scale.costs.sizes import LARGEST_BUCKET
from bd3_scale.distributed.layout import Layout
from bd3_scale.engines.engine import Engine, MasterSlice, clip, global_norm, master_slices, owns
from bd3_scale.light_imports import uncompiled
from bd3_scale.megatron_core import parallel_state
from bd3_scale.optimizers.settings import OptimizerSettings


class MegatronGroups:
    """Adapter: DeepSpeed's `mpu` interface on megatron-core's parallel_state, three of whose names changed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_group(self) -> Any:
        return parallel_state.get_tensor_model_parallel_group()

    def get_data_parallel_group(self) -> Any:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return torch.distributed.get_process_group_ranks(self.get_data_parallel_group())


class ZeroEngine(Engine):
    """A model under DeepSpeed ZeRO, which `initialise` gives its weights. Make it last: tensor parallelism, recomputation and compile
    come before."""

    def __init__(self, model: nn.Module, layout: Layout, settings: OptimizerSettings, *, zero: int, bf16: bool) -> None:
        deepspeed = _import_deepspeed(layout.device.type)
        self.layout, self.zero, self.settings = layout, zero, settings
        _sum_partial_gradients(model)
        parameter_groups = settings.groups()
        for name, parameter in model.named_parameters():
            parameter_groups[settings.group_of(name, parameter.dim())]["params"].append(parameter)
        self.adam = settings.build(parameter_groups, layout.device)
        config = _deepspeed_config(model, zero, 0.0 if zero == 0 else settings.clip, bf16, layout.device.type)
        groups = MegatronGroups()
        if zero == 3:
            divide(model, config, torch.bfloat16 if bf16 else torch.float32, groups)
        with without_broadcast():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=self.adam, config=config, mpu=groups)
        self.masters = self._find_masters()
        self.slices = list(self._find_slices())
        # Under ZeRO 3 DeepSpeed updates one master after the other.
        self.bind_optimizer(parallel_state.get_tensor_model_parallel_group() if zero == 0 else dist.group.WORLD, each_alone=zero == 3)

    # -- a step --------------------------------------------------------------------------------------------------------

    def forward_backward(self, micro_batches: Sequence[Any], tokens: int) -> Tensor:
        self.engine.train()
        total = torch.zeros((), device=self.layout.device)
        for inputs in micro_batches:
            weighted, _ = self.engine(inputs.to(self.layout.device, non_blocking=True))
            # DeepSpeed averages over the data-parallel ranks: undo it, the sum is already divided by all tokens.
            loss = weighted * (self.layout.states / tokens)
            last = inputs is micro_batches[-1]
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss, scale_wrt_gas=False)
            total += weighted.detach() / tokens
            if not last:
                self.engine.step()
        return total

    def step(self, learning_rate: float) -> Tensor:
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        if self.zero == 0:
            # DeepSpeed neither reports nor clips without a sync here; the gradients are whole on every data-parallel rank.
            with_gradient = [p for p in self.engine.module.parameters() if p.grad is not None]
            owned = [p.grad for p in with_gradient if owns(p, self.layout)]
            tensor_group = parallel_state.get_tensor_model_parallel_group() if self.layout.tensor > 1 else None
            norm = global_norm(owned, tensor_group, self.layout.device)
            self.adam.begin(lambda: norm)
            clip([p.grad for p in with_gradient], norm, self.settings.clip)
            self.engine.step()
            return norm
        self.adam.begin(lambda: norm_on_device(self.optimizer._global_grad_norm, self.layout.device))
        self.engine.step()
        return norm_on_device(self.optimizer._global_grad_norm, self.layout.device)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any]) -> list[Tensor | None]:
        self.engine.eval()
        return [self.engine(inputs.to(self.layout.device, non_blocking=True))[1] for inputs in micro_batches]

    # -- the state -----------------------------------------------------------------------------------------------------

    @property
    def networks(self) -> list[Any]:
        return [self.engine.module]

    @property
    def replicas(self) -> tuple[int, int]:
        return (self.layout.state_rank, self.layout.states) if self.zero == 0 else (0, 1)

    @property
    def copy_of(self) -> Any:
        return super().copy_of if self.zero < 3 else None

    @torch.no_grad()
    def publish(self) -> None:
        if self.zero in (1, 2):
            self.optimizer.update_lp_params()
        elif self.zero == 3:
            # Small weights stay gathered between steps, and gathering skips what is: let go of the old values first.
            self.optimizer._partition_all_parameters()
            for group in range(len(self.masters)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if self.optimizer.persistent_parameters:
                self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)

    def close(self) -> None:
        self.engine.destroy()

    # -- how DeepSpeed keeps it ----------------------------------------------------------------------------------------

    def _find_masters(self) -> list[Tensor]:
        if self.zero == 0:
            return list(self.engine.module.parameters())
        if self.zero == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        # Stage 1 with bf16 weights is DeepSpeed's BF16_Optimizer, which has another name for the same.
        names = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups")
        return next(getattr(self.optimizer, name) for name in names if hasattr(self.optimizer, name))

    def _find_slices(self) -> Iterator[MasterSlice]:
        for index, (name, parameter) in enumerate(self.engine.module.named_parameters()):
            if self.zero == 0:
                yield from master_slices(name, parameter, self.layout, 0, parameter.numel(), index, 0)
            elif self.zero == 3:
                group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                start = size * self.layout.state_rank
                stop = min(start + size, parameter.ds_numel)  # the last rank's share is padded
                if start < stop:
                    yield from master_slices(name, _with_shape(parameter), self.layout, start, stop, group, offset)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                offset = mapping.hp_fragment_address.start
                yield from master_slices(name, parameter, self.layout, start, start + size, mapping.param_group_index, offset)


def _with_shape(parameter: Any) -> Any:
    """A ZeRO-3 parameter, whose own data may be away, as something that has its shape and its attributes."""
    stand_in = torch.empty(parameter.ds_shape, device="meta")
    stand_in.__dict__.update({key: value for key, value in parameter.__dict__.items() if not key.startswith("ds_")})
    return stand_in


def _sum_partial_gradients(model: nn.Module) -> None:
    """Sum the gradients marked `sequence_parallel` over the tensor ranks as they arise, before DeepSpeed's own hooks."""
    group = parallel_state.get_tensor_model_parallel_group()

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(summed)


def _import_deepspeed(device: str) -> Any:
    # Its shared-memory operator is built by a C++ compiler at the first start, for inference only: never build it.
    # It calls collectives by names that newer torch has renamed, and warns about that on every call.
    os.environ.setdefault("DS_ACCELERATOR", device)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    with uncompiled():  # it looks whether an optimizer is its Muon, which it would compile: half a second for the whole compiler
        import deepspeed.runtime.zero.muon.original_muon

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    patch_norms()
    return deepspeed


def _deepspeed_config(model: nn.Module, zero: int, clip: float, bf16: bool, device: str) -> dict[str, Any]:
    # Buckets are allocated at their full size: never larger than what there is to send. DeepSpeed wants them even.
    numel = sum(parameter.numel() for parameter in model.parameters())
    bucket = min(numel + numel % 2, LARGEST_BUCKET)
    return {
        # Neither counts: steps differ in their micro-batches, and `forward_backward` says which one is the last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "steps_per_print": 2**62,
        # Its timer waits for the device at every forward and every step.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero,
            "overlap_comm": device == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket // 4,
        },
        # Whether a step is left out is decided elsewhere, without waiting for the device.
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        # Gradients of bf16 weights are accumulated over micro-batches and summed over ranks in fp32.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


# -- a start with a network that has no weights yet ----------------------------------------------------------------------
#
# DeepSpeed has the first rank broadcast every weight; here nobody has any. The network was made on the host without being filled, and
# memory that nobody writes costs nothing. Under ZeRO 3 each parameter gets room on the device, is divided, and gives the room back.
# Every rank then fills its own masters (`Engine.initialise`).


def divide(module: nn.Module, config: dict[str, Any], dtype: torch.dtype, mpu: Any) -> None:
    """Divide the parameters over the data-parallel ranks, as `deepspeed.initialize` would; `config` and `mpu` as for that."""
    from deepspeed.runtime.zero.partition_parameters import Init

    class Divided(Init):  # type: ignore[misc]
        def _convert_to_zero_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
            for parameter in dict.fromkeys(parameters):
                parameter.data = torch.empty(parameter.shape, dtype=dtype, device=self.local_device)
                self._convert_to_deepspeed_param(parameter)
                parameter.partition()  # type: ignore[attr-defined]

    Divided(module, data_parallel_group=mpu.get_data_parallel_group(), dtype=dtype, config_dict_or_path=config, mpu=mpu)


@contextmanager
def without_broadcast() -> Iterator[None]:
    """While `deepspeed.initialize` runs: no rank has weights that others want."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    broadcast = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda self: None
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = broadcast


# -- norms that stay on the device -------------------------------------------------------------------------------------
#
# DeepSpeed reads the norm on the host to see whether it is finite, and to see whether to clip: the host waits for the backward, once to
# four times a step. Here a step is left out on the device (optimizers/adamw.py), so that the first question has no need of an answer, and
# clipping by a factor of 1 is no clipping. Where a norm is not finite DeepSpeed writes -1 into it, a number that it takes to the device and
# that torch then reads. In the modules named below, and nowhere else, these functions are bound to ones that do not wait; a test counts
# the reads of every ZeRO stage.

VERSION = "0.19.8"
JUDGING = ("bf16_optimizer", "zero.stage_1_and_2", "zero.stage3")
"""Modules that make no step where `is_invalid_grad_norm`."""
MARKING = ("utils", "zero.stage_1_and_2", "zero.stage3")
"""Modules that mark a norm which is not finite by `mask_nan_or_inf_with_val_inplace`."""


def patch_norms() -> None:
    """Bind them; harmless when repeated. Raises RuntimeError for another version of DeepSpeed."""
    import deepspeed

    if deepspeed.__version__.split("+")[0] != VERSION:
        raise RuntimeError(f"DeepSpeed {deepspeed.__version__} is installed, but this version of bd3_scale needs {VERSION}: pip install .")
    modules: dict[str, Any] = {name: importlib.import_module(f"deepspeed.runtime.{name}") for name in (*JUDGING, *MARKING)}
    for name in JUDGING:
        assert callable(modules[name].is_invalid_grad_norm)
        modules[name].is_invalid_grad_norm = _left_to_the_step_rule
    for name in MARKING:
        assert callable(modules[name].mask_nan_or_inf_with_val_inplace)
        modules[name].mask_nan_or_inf_with_val_inplace = _mark
    assert callable(modules["bf16_optimizer"].clip_tensors_by_global_norm)
    modules["bf16_optimizer"].clip_tensors_by_global_norm = _clip


def norm_on_device(found: Tensor | float, device: torch.device) -> Tensor:
    """DeepSpeed's global gradient norm as a fp32 scalar on the device, also where it answers a number of Python; -1, its word for one
    that is not finite, as infinity."""
    # A number is written there by a kernel; to copy it would be to wait.
    norm = found.to(device, torch.float32) if isinstance(found, Tensor) else torch.full((), found, dtype=torch.float32, device=device)
    return norm.masked_fill(norm < 0, torch.inf)


def _left_to_the_step_rule(norm: Any) -> bool:
    return False


def _mark(input: Tensor, device: Any = None, val: float = -1.0) -> None:
    input.masked_fill_(~torch.isfinite(input), val)


def _clip(input_tensors: Sequence[Tensor], max_norm: float, global_norm: Tensor, mpu: Any = None) -> Tensor:
    clip(input_tensors, global_norm, max_norm)
    return global_norm
