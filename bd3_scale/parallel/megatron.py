"""Training with pipeline stages: megatron-core's 1F1B and interleaved schedules, gradient buffers and distributed optimizer.

Between stages only hidden states travel. Every stage reads the same rows and makes noise, positions and masks itself from
(seed, step, slot); the first embeds, the last scores. ZeRO 0 keeps everything on every data-parallel rank; ZeRO 1 divides
masters and moments over them (megatron-core's DistributedOptimizer). Gradients are summed in fp32.

Invariants: as in `engine.py`; a parameter that several stages hold (a tied embedding, the noise condition) has the same
value on all of them, because each gets the sum of their gradients, and is counted and written once (`shared` on the copies).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bd3_scale.diffusion.inputs import NetworkInputs
from bd3_scale.model.transformer import Transformer
from bd3_scale.parallel import megatron_cpu
from bd3_scale.parallel.adamw import SkippingAdamW
from bd3_scale.parallel.engine import Engine, OptimizerSettings, Place, clip, global_norm, owns, place
from bd3_scale.parallel.layout import Layout
from bd3_scale.parallel.stages import micro_batch_group


class MegatronEngine(Engine):
    """This rank's chunks of the network (one, or one per virtual stage) under megatron-core."""

    def __init__(self, chunks: Sequence[Transformer], layout: Layout, settings: OptimizerSettings, *, zero: int, bf16: bool) -> None:
        self.layout, self.settings, self.zero = layout, settings, zero
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.transformers = [chunk.to(self.dtype) for chunk in chunks]
        self._mark_shared()
        if layout.device.type == "cpu":
            megatron_cpu.name_types_as_on_cuda(p for chunk in chunks for p in chunk.parameters())
        self.config = self._schedule_config()
        buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=zero == 1)
        self.chunks = [
            DistributedDataParallel(self.config, buffers, _Stage(chunk), disable_bucketing=index > 0)
            for index, chunk in enumerate(self.transformers)
        ]
        self.config.no_sync_func = [chunk.no_sync for chunk in self.chunks] if self.interleaved else self.chunks[0].no_sync
        self.distributed = self._distributed_optimizer() if zero == 1 else None
        # Every virtual stage has its own copy of the noise condition, under the same name.
        self._named: list[tuple[str, Any]] = [(name, p) for chunk in self.transformers for name, p in chunk.named_parameters()]
        self.adam = self._make_adam()
        self.places = list(self._find_places())
        self._owned = [master for master, parameter in self._masters if owns(parameter, layout)]

    @property
    def interleaved(self) -> bool:
        return len(self.chunks) > 1

    # -- a step --------------------------------------------------------------------------------------------------------

    def forward_backward(self, micro_batches: Sequence[NetworkInputs], tokens: int) -> Tensor:
        self._tokens = tokens
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        losses = self._run(micro_batches, forward_only=False)
        return torch.stack(losses).sum() / tokens if losses else torch.zeros((), device=self.layout.device)

    def step(self, learning_rate: float) -> Tensor:
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        if self.distributed is None:
            for parameter in self.masters:
                parameter.grad = parameter.main_grad  # type: ignore[attr-defined]
            holders = parallel_state.get_model_parallel_group()
        else:
            self.distributed.prepare_grads()
            holders = dist.group.WORLD  # masters are divided over the data-parallel ranks, too
        norm = global_norm([m.grad for m in self._owned if m.grad is not None], holders, self.layout.device)
        self.adam.begin(lambda: norm)
        clip([m.grad for m in self.masters if m.grad is not None], norm, self.settings.clip)
        if self.distributed is None:
            self.adam.step()
            for parameter in self.masters:
                parameter.grad = None  # else the next backward would add to the buffer that it is
        else:
            self.distributed.step_with_ready_grads()
        return norm

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[NetworkInputs]) -> list[Tensor | None]:
        for chunk in self.chunks:
            chunk.eval()
        answers: list[Tensor | None] = [None] * len(micro_batches)
        # Stages exchange tensors of one size in a run of the schedule: the last, smaller micro-batch makes a run of its own.
        for size in dict.fromkeys(len(inputs.tokens) for inputs in micro_batches):
            wanted = [index for index, inputs in enumerate(micro_batches) if len(inputs.tokens) == size]
            # An interleaved schedule needs as many micro-batches as stages.
            missing = max(0, self.layout.pipeline - len(wanted)) if self.interleaved else 0
            found = self._run([micro_batches[index] for index in wanted + wanted[-1:] * missing], forward_only=True)
            for index, nll in zip(wanted, found, strict=False):
                answers[index] = nll
        return answers

    def _run(self, micro_batches: Sequence[NetworkInputs], *, forward_only: bool) -> list[Tensor]:
        """One run of the schedule; what the last stage finds per micro-batch: its weighted sum, or its nll."""
        self.config.microbatch_group_size_per_vp_stage = micro_batch_group(len(micro_batches), self.layout.pipeline)
        iterators = [iter(micro_batches) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if self.interleaved else iterators[0],
            model=self.chunks if self.interleaved else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].pattern.rows,
            micro_batch_size=len(micro_batches[0].tokens),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _forward_step(self, micro_batches: Iterator[NetworkInputs], stage: nn.Module) -> tuple[Any, Any]:
        return stage(next(micro_batches).to(self.layout.device, non_blocking=True)), self._found

    def _found(self, output: tuple[Tensor, Tensor], non_loss_data: bool = False) -> Any:
        """Of the last stage's output: the loss to go back from, no count of tokens (it is divided here), what to keep."""
        weighted, nll = output
        if non_loss_data:
            return nll
        return weighted / self._tokens, torch.zeros((), dtype=torch.int, device=weighted.device), weighted.detach()

    def _finalise(self, model: Sequence[nn.Module], *unused: Any, **also_unused: Any) -> None:
        """After the last micro-batch: sum gradients over data-parallel ranks, then over those that hold parts of the same."""
        for chunk in self.chunks:
            chunk.finish_grad_sync()
        partial = [p.main_grad for _, p in self._named if getattr(p, "sequence_parallel", False)]
        _sum_together(partial, parallel_state.get_tensor_model_parallel_group())
        conditions: dict[str, list[Tensor]] = {}
        for name, parameter in self._named:
            if name.startswith("condition."):
                conditions.setdefault(name, []).append(parameter.main_grad)
            elif name == "embedding.weight" and getattr(parameter, "shared_embedding", False):
                dist.all_reduce(parameter.main_grad, group=parallel_state.get_embedding_group())
        sums = [torch.stack(copies).sum(0) for copies in conditions.values()]
        _sum_together(sums, parallel_state.get_pipeline_model_parallel_group())
        for total, copies in zip(sums, conditions.values(), strict=True):
            for copy in copies:
                copy.copy_(total)

    # -- the state -----------------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> tuple[int, int]:
        return (self.layout.data_rank, self.layout.data) if self.zero == 0 else (0, 1)

    @torch.no_grad()
    def publish(self) -> None:
        if self.distributed is not None:
            self.distributed._copy_main_params_to_model_params()
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def close(self) -> None:
        for chunk in self.chunks:
            chunk.grad_accs.clear()

    # -- how megatron-core wants it ------------------------------------------------------------------------------------

    def _mark_shared(self) -> None:
        """Copies count once; each shared parameter gets a bucket of its own, so that every stage divides it alike (ZeRO 1)."""
        for chunk in self.transformers:
            tied = chunk.config.tied_head and (chunk.first or chunk.last)
            for name, parameter in chunk.named_parameters():
                if name.startswith("condition.") or (tied and name == "embedding.weight"):
                    parameter.shared = not chunk.first  # type: ignore[attr-defined]
                    parameter.shared_embedding = True  # type: ignore[attr-defined]

    def _schedule_config(self) -> TransformerConfig:
        model, layout, virtual = self.transformers[0].config, self.layout, len(self.transformers)
        interleaved = virtual > 1
        return TransformerConfig(
            num_layers=layout.pipeline * virtual,  # of which only the shape of what stages exchange is used
            hidden_size=model.hidden,
            num_attention_heads=model.heads,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=virtual if interleaved else None,
            sequence_parallel=self.transformers[0].linears.sequence,
            params_dtype=self.dtype,
            pipeline_dtype=self.dtype,
            bf16=self.dtype == torch.bfloat16,
            calculate_per_token_loss=True,  # megatron-core divides by nothing: the loss is divided here
            finalize_model_grads_func=self._finalise,
            # With two stages, batched exchange of the interleaved schedule is silently wrong: both go to the same peer.
            overlap_p2p_comm=interleaved,
            batch_p2p_comm=not interleaved,
            batch_p2p_sync=False,
            # Freed outputs are read by sends that are still under way when the exchange overlaps.
            deallocate_pipeline_outputs=not interleaved,
            use_cpu_initialization=True,
        )

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
        """torch's AdamW on the masters, whatever else is installed (megatron-core would take what it finds)."""
        if self.distributed is None:
            self._masters = [(p, p) for _, p in self._named]
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
        adam = self.settings.adam([], [], self.layout.device)
        # Afterwards, because megatron-core's masters of fp32 weights are views, which torch takes no optimizer for.
        for master, parameter in self._masters:
            adam.param_groups[0 if parameter.dim() >= 2 else 1]["params"].append(master)
        if self.distributed is not None:
            self.distributed.optimizer = adam
        return adam

    def _find_places(self) -> Iterator[Place]:
        names = {id(parameter): name for name, parameter in self._named}
        for index, (_, parameter) in enumerate(self._masters):
            start, stop = 0, parameter.numel()
            if self.distributed is not None:
                part = self.distributed._get_model_param_range_map(parameter)["param"]
                start, stop = part.start, part.end
            yield from place(names[id(parameter)], parameter, self.layout, start, stop, index, 0)


class _Stage(nn.Module):
    """A slice of the network as megatron-core's schedules drive it: they hand in what the stage before has computed."""

    def __init__(self, module: Transformer) -> None:
        super().__init__()
        self.model_type = ModelType.encoder_or_decoder
        self.module = module
        self._received: Tensor | None = None

    def set_input_tensor(self, tensors: Any) -> None:
        self._received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self, inputs: NetworkInputs) -> Any:
        received, self._received = self._received, None
        return self.module(inputs, received)


def _sum_together(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over a group in place, in one collective. Every rank of the group calls with tensors of the same shapes."""
    if tensors and dist.get_world_size(group) > 1:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
