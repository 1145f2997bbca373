"""Training by megatron-core's schedules: 1F1B and interleaved with pipeline stages, one micro-batch after the other without.

What engines that are driven by a schedule share: its configuration, what a stage gets and gives, validation, and the sums of
gradients that are no data parallelism. How weights are kept and gradients are reduced over the data-parallel ranks is theirs.

Between stages only hidden states travel. Every stage reads the same rows and makes noise, positions and masks itself from
(seed, step, slot); the first embeds, the last scores.

Invariants: as in `engine.py`; a parameter that several stages hold (a tied embedding, the noise condition) has the same
value on all of them, because each gets the sum of their gradients, and is counted and written once (`shared` on the copies).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bd3_scale.costs.pipeline_stages import micro_batch_group
from bd3_scale.distributed.layout import Layout
from bd3_scale.engines.engine import Engine, clip, global_norm
from bd3_scale.megatron_core import parallel_state
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.network_inputs import NetworkInputs


class ScheduledEngine(Engine):
    """This rank's chunks of the network (one, or one per virtual stage), driven by a schedule."""

    transformers: list[Transformer]
    chunks: list[nn.Module]
    """What the schedule calls: each a `Stage` around a transformer, or what an engine puts around that."""
    config: TransformerConfig
    named: list[tuple[str, Any]]
    """Canonical name and parameter, or something with its shape and attributes, of all chunks. Every virtual stage has its own copy
    of the noise condition, under the same name."""
    owned: list[Tensor]
    """The masters that this rank speaks for: over the ranks of `prepare_step`, every element is in one of them once."""

    # -- what an engine adds -------------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self) -> None:
        """Forget the gradients of the step before."""

    @abstractmethod
    def finish_reduction(self) -> None:
        """Wait until gradients are summed over the data-parallel ranks; called after the last backward of a step."""

    @abstractmethod
    def gradient(self, parameter: Any) -> Tensor:
        """fp32, of one of `named`, as far as this rank has it; changing it changes what is stepped with."""

    @abstractmethod
    def prepare_step(self) -> dist.ProcessGroup | None:
        """Give every master its gradient. Returns the ranks that together hold one copy of everything."""

    def spread(self) -> None:
        """Begin to bring the masters that were stepped into the weights that compute."""

    # -- a step --------------------------------------------------------------------------------------------------------

    @property
    def networks(self) -> list[Any]:
        return list(self.transformers)

    @property
    def interleaved(self) -> bool:
        return len(self.transformers) > 1

    def forward_backward(self, micro_batches: Sequence[NetworkInputs], tokens: int) -> Tensor:
        self._tokens = tokens
        for chunk in self.chunks:
            chunk.train()
        self.begin()
        losses = self._run(micro_batches, forward_only=False)
        return torch.stack(losses).sum() / tokens if losses else torch.zeros((), device=self.layout.device)

    def step(self, learning_rate: float) -> Tensor:
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        holders = self.prepare_step()
        norm = global_norm([master.grad for master in self.owned if master.grad is not None], holders, self.layout.device)
        self.adam.begin(lambda: norm)
        clip([master.grad for master in self.masters if master.grad is not None], norm, self.settings.clip)
        self.adam.step()
        for master in self.masters:
            master.grad = None  # of a parameter, the next backward would add to it
        self.spread()
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
            seq_length=micro_batches[0].pattern.rows * self.layout.context,  # of all context ranks, as megatron-core has it
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
        self.finish_reduction()
        partial = [self.gradient(p) for _, p in self.named if getattr(p, "sequence_parallel", False)]
        sum_together(partial, parallel_state.get_tensor_model_parallel_group())
        if self.layout.pipeline == 1:
            return
        conditions: dict[str, list[Tensor]] = {}
        for name, parameter in self.named:
            if name.startswith("condition."):
                conditions.setdefault(name, []).append(self.gradient(parameter))
            elif name == "embedding.weight" and getattr(parameter, "shared_embedding", False):
                dist.all_reduce(self.gradient(parameter), group=parallel_state.get_embedding_group())
        sums = [torch.stack(copies).sum(0) for copies in conditions.values()]
        sum_together(sums, parallel_state.get_pipeline_model_parallel_group())
        for total, copies in zip(sums, conditions.values(), strict=True):
            for copy in copies:
                copy.copy_(total)

    def schedule_config(self, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
        """Of `transformers`, whose hidden states have `dtype`."""
        model, virtual = self.transformers[0].config, len(self.transformers)
        interleaved = virtual > 1
        return TransformerConfig(
            num_layers=layout.pipeline * virtual,  # of which only the shape of what stages exchange is used
            hidden_size=model.hidden,
            num_attention_heads=model.heads,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=virtual if interleaved else None,
            sequence_parallel=self.transformers[0].factory.sequence,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            calculate_per_token_loss=True,  # megatron-core divides by nothing: the loss is divided here
            finalize_model_grads_func=self._finalise,
            # With two stages, batched exchange of the interleaved schedule is silently wrong: both go to the same peer.
            overlap_p2p_comm=interleaved,
            batch_p2p_comm=not interleaved,
            batch_p2p_sync=False,
            # Freed outputs are read by sends that are still under way when the exchange overlaps; one stage sends none.
            deallocate_pipeline_outputs=layout.pipeline > 1 and not interleaved,
            use_cpu_initialization=True,
        )


class Stage(nn.Module):
    """A slice of the network as megatron-core's schedules drive it: they hand in what the stage before has computed."""

    def __init__(self, module: Transformer, config: TransformerConfig) -> None:
        super().__init__()
        self.model_type, self.config = ModelType.encoder_or_decoder, config
        self.module = module
        self._received: Tensor | None = None

    def set_input_tensor(self, tensors: Any) -> None:
        self._received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self, inputs: NetworkInputs) -> Any:
        received, self._received = self._received, None
        answer = self.module(inputs, received)
        if self.module.last or answer._base is None:
            return answer
        return answer.clone()  # the schedule frees what a stage hands on, which must be no view


def mark_shared(transformers: Sequence[Transformer], pipeline: int) -> None:
    """Mark what several stages hold: `shared_embedding` (megatron-core's word) on all copies, `shared` on those that do not count."""
    for chunk in transformers:
        tied = chunk.config.tied_head and chunk.first != chunk.last
        for name, parameter in chunk.named_parameters():
            if (pipeline > 1 and name.startswith("condition.")) or (tied and name == "embedding.weight"):
                parameter.shared = not chunk.first  # type: ignore[attr-defined]
                parameter.shared_embedding = True  # type: ignore[attr-defined]


def sum_together(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over a group in place, in one collective. Every rank of the group calls with tensors of the same shapes."""
    if tensors and dist.get_world_size(group) > 1:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
