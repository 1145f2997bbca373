"""ZeRO 2 and 3 under any schedule: torch's `fully_shard` (FSDP2) around every layer, with or without pipeline stages.

fp32 shards are the masters: of every parameter of the rank, rows [i * ceil(n / k), ...) of data-parallel rank i among the k that
share a copy. Weights that compute are gathered from them, in bf16 where the recipe computes so:

- ZeRO 3: layer by layer, for the forward and again for the backward of each micro-batch, and let go in between;
- ZeRO 2: once a step, and kept over its micro-batches. Gradients are divided at each micro-batch, in fp32, with both.

With fewer sharers than data-parallel ranks (HSDP, `parallel.shard`) the copies sum their shards of the gradients once a step.
Each layer is a group of its own, gathered and reduced in one collective; so are the embedding and the head. The rest is the root's:
norms, conditions, learned positions, and a tied embedding where a chunk embeds and scores, or only scores.

Invariants: as in `pipeline_engine.py`; a network comes without weights (on the meta device) and is never whole anywhere; between two steps
nothing is gathered, so that a forward sees whatever was written to the masters; a step reads nothing back to the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bd3_scale.distributed.layout import Layout
from bd3_scale.engines.engine import MasterSlice, master_slices, owns
from bd3_scale.engines.pipeline_engine import ScheduledEngine, Stage, mark_shared
from bd3_scale.megatron_core import parallel_state
from bd3_scale.model.transformer import Transformer
from bd3_scale.optimizers.settings import OptimizerSettings


class FsdpEngine(ScheduledEngine):
    """This rank's chunks of the network (one, or one per virtual stage), made on the meta device, with room for their shards; call
    `initialise` next. Make it last: tensor parallelism, recomputation and compile come before.

    `shard`: ranks (of `Layout.states`) that share one copy. `looked_up`: tokens are looked up in the embedding and nothing else, so that
    its backward needs no weight (False for ssdlm, which multiplies with it).
    """

    def __init__(
        self,
        chunks: Sequence[Transformer],
        layout: Layout,
        settings: OptimizerSettings,
        *,
        zero: int,
        shard: int,
        bf16: bool,
        looked_up: bool = True,
    ) -> None:
        self.layout, self.settings, self.zero, self.shard = layout, settings, zero, shard
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.transformers = list(chunks)
        self.config = self.schedule_config(layout, self.dtype)
        mark_shared(self.transformers, layout.pipeline)
        mesh = data_mesh(layout, shard)
        # Of layers whose last step is a change of shape; nothing here writes into what a layer returned.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
        self.named: list[tuple[str, Any]] = []
        self._units: list[Any] = []
        for chunk in self.transformers:
            outlines = {name: _outline(parameter) for name, parameter in chunk.named_parameters()}
            self._units += self._divide(chunk, mesh, looked_up)
            _materialise(chunk, layout.device)
            for name, parameter in chunk.named_parameters():
                outlines[name].sharded = parameter
            self.named += outlines.items()
        self.chunks = [Stage(chunk, self.config) for chunk in self.transformers]
        self.config.no_sync_func = self._before_the_last
        self._held = [(name, outline, shard_of(outline.sharded)) for name, outline in self.named]
        self._held = [held for held in self._held if held[2].numel()]  # the last ranks have no row of the smallest
        self.masters = [master for _, _, master in self._held]
        self.owned = [master for _, outline, master in self._held if owns(outline, layout)]
        self.slices = list(self._find_slices())
        groups = settings.groups()
        for name, outline, master in self._held:
            groups[settings.group_of(name, outline.dim())]["params"].append(master)
        self.adam = settings.build(groups, layout.device)
        # The ranks that together hold one copy of everything.
        self._holders = parallel_state.get_intra_distributed_optimizer_instance_group()
        self.bind_optimizer(self._holders)

    # -- a step --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        for _, outline in self.named:
            outline.sharded.grad = None

    @property
    def copy_of(self) -> Any:
        return (*super().copy_of, self.layout.state_rank % self.shard) if self.shard < self.layout.states else None

    def finish_reduction(self) -> None:
        """Nothing to do: torch's own end of the last backward has the device wait for the reductions."""

    def gradient(self, parameter: Any) -> Tensor:
        return shard_of(parameter.sharded.grad)

    def prepare_step(self) -> dist.ProcessGroup:
        self.publish()
        for _, outline, master in self._held:
            master.grad = self.gradient(outline)
        return self._holders

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any]) -> list[Tensor | None]:
        answers = super().evaluate(micro_batches)
        self.publish()
        return answers

    @contextmanager
    def _before_the_last(self) -> Iterator[None]:
        """Around the backwards that another one follows: their reductions need not be waited for, and copies add up alone."""
        self._let_last(False)
        try:
            yield
        finally:
            self._let_last(True)

    def _let_last(self, last: bool) -> None:
        for chunk in self.transformers:
            root: Any = chunk
            root.set_is_last_backward(last)
            root.set_requires_all_reduce(last)

    # -- the state -----------------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> tuple[int, int]:
        return self.layout.state_rank // self.shard, self.layout.states // self.shard

    def publish(self) -> None:
        """Let go of gathered weights: the next forward gathers what the masters then are."""
        for unit in self._units:
            unit.reshard()

    def close(self) -> None:
        self._units.clear()

    # -- how torch wants it --------------------------------------------------------------------------------------------

    def _divide(self, chunk: Transformer, mesh: DeviceMesh, looked_up: bool) -> list[Any]:
        """Put `fully_shard` around the parts of a chunk and around what is left of it; returns them, in the order of a forward."""
        units: list[Any] = list(chunk.blocks.values())
        tied = chunk.config.tied_head
        embeds, scores = chunk.first and not (tied and chunk.last), chunk.last and not tied
        if embeds:
            units.insert(0, chunk.embedding)
        if scores:
            units.append(chunk.head)
        # The caller casts nothing on its way in: angles, noise levels and loss weights are fp32 on purpose.
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in [*units, chunk]:
            # With one stage a backward begins where the forward ends: what the root has gathered is needed at once.
            again = self.zero == 3 and (unit is not chunk or self.layout.pipeline > 1)
            fully_shard(unit, mesh=mesh, reshard_after_forward=again, mp_policy=policy)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        root: Any = chunk
        root.set_reshard_after_backward(self.zero == 3)
        # A lookup needs no weight for its gradient, and the head has formed its own in the forward (loss_head.py).
        if embeds:
            units[0].set_unshard_in_backward(not looked_up)
        if scores:
            units[-1].set_unshard_in_backward(False)
        # Each backward gathers for the one behind it. Left alone, torch guesses from the order of all forwards so far, in which
        # other micro-batches are, too; for the first to name itself is to name nothing.
        for before, unit in zip([units[0], *units], [*units, root], strict=True):
            unit.set_modules_to_backward_prefetch([before])
        return [*units, root]

    def _find_slices(self) -> Iterator[MasterSlice]:
        rank = self.layout.state_rank % self.shard
        for index, (name, outline, master) in enumerate(self._held):
            rows = -(-outline.shape[0] // self.shard)
            start = rank * rows * (outline.numel() // outline.shape[0])
            yield from master_slices(name, outline, self.layout, start, start + master.numel(), index, 0)


def data_mesh(layout: Layout, shard: int) -> DeviceMesh:
    """The data-parallel ranks as torch wants them; with fewer sharers than those, copies x sharers."""
    group, kind = parallel_state.get_data_parallel_group(with_context_parallel=True), layout.device.type
    if shard == layout.states:
        return DeviceMesh.from_group(group, kind)
    sharers = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)
    copies = parallel_state.get_inter_distributed_optimizer_instance_group()
    ranks = torch.tensor(dist.get_process_group_ranks(group)).view(-1, shard)
    return DeviceMesh.from_group([copies, sharers], kind, ranks, mesh_dim_names=("copies", "sharers"))


@torch.no_grad()
def shard_of(parameter: Any) -> Tensor:
    """This rank's rows, live."""
    local: Tensor = parameter.to_local()
    return local


def _outline(parameter: nn.Parameter) -> Any:
    """What is to be remembered of a parameter: its shape on the tensor rank, and what was written on it."""
    outline = torch.empty(parameter.shape, device="meta")
    outline.__dict__.update(parameter.__dict__)
    return outline


def _materialise(chunk: Transformer, device: torch.device) -> None:
    """Room for the shards, and for nothing else."""
    chunk.to_empty(device=device)
    if chunk.last and chunk.config.tied_head:
        chunk.head.weight = chunk.embedding.weight  # which `to_empty` took apart
