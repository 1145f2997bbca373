"""One small interface for training: forward-backward, step, evaluate, and the full-precision state by name.

The loop, the EMA and the checkpoints see a rank's state as a list of flat fp32 tensors (`masters`, with their optimizer's
states) and a list of `MasterSlice`s that says which region of which canonical parameter lies where in them. Behind it stand
DeepSpeed's ZeRO 0-3 (`zero_engine.py`) and, driven by megatron-core's schedules (`pipeline_engine.py`), its distributed optimizer
(`megatron_engine.py`) and torch's `fully_shard` (`fsdp_engine.py`).

Invariants: the gradient is the gradient of sum(weighted nll) / (global data tokens of the step), whatever the layout;
parameters carry their canonical names; every element of the unsharded state is owned by exactly one rank of a replica
(`MasterSlice.owned`), however many hold it; nothing here copies the whole state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_scale.checkpoint.fragments import Fragment, share
from bd3_scale.checkpoint.region import Region
from bd3_scale.distributed.layout import Layout
from bd3_scale.engines.initialise import fill
from bd3_scale.model.layers import full_shape
from bd3_scale.optimizers.adamw import SkippingAdamW
from bd3_scale.optimizers.matrix_owners import Piece
from bd3_scale.optimizers.muon import Held, Muon
from bd3_scale.optimizers.settings import OptimizerSettings
from bd3_scale.recipe.optimizers import is_hidden
from bd3_scale.recipe.schema import ModelConfig


@dataclass(frozen=True)
class MasterSlice:
    """`masters[master][offset : offset + numel]`, flattened, holds `region` of the canonical parameter `name`."""

    name: str
    region: Region
    master: int
    offset: int
    owned: bool
    """False where another tensor rank or stage of the same replica holds the same and speaks for it."""

    @property
    def numel(self) -> int:
        return self.region.stop - self.region.start


class Engine(ABC):
    """A model that trains on this rank's part of the layout."""

    layout: Layout
    settings: OptimizerSettings
    masters: list[Tensor]
    """fp32 weights that this rank updates, in the order of its slices."""
    slices: list[MasterSlice]

    @abstractmethod
    def forward_backward(self, micro_batches: Sequence[Any], tokens: int) -> Tensor:
        """Accumulate the gradient of this rank's share. `tokens`: data tokens of the step over all ranks and micro-batches.
        Returns this rank's part of the train loss (fp32 scalar on the device, no host sync; see `Layout.sum_of_replicas`)."""

    @abstractmethod
    def step(self, learning_rate: float) -> Tensor:
        """Clip, update (or leave the step out, see optimizers/adamw.py), and return the global gradient norm before clipping."""

    @abstractmethod
    def evaluate(self, micro_batches: Sequence[Any]) -> list[Tensor | None]:
        """Of each, the nll fp32 [n] of its selected positions without dropout; None on stages that have no head."""

    @abstractmethod
    def publish(self) -> None:
        """Copy the masters into the weights that compute (and to the other ranks, where weights are whole)."""

    def settle(self) -> None:  # noqa: B027 - most engines have nothing under way between two calls
        """Wait for whatever still reads the masters: to be called before others than the engine write them."""

    adam: SkippingAdamW
    """The torch optimizer whose parameters the masters are."""

    @property
    @abstractmethod
    def networks(self) -> list[Any]:
        """The chunks of the network (`Transformer`) that this rank computes."""

    @property
    @abstractmethod
    def replicas(self) -> tuple[int, int]:
        """(index, count) of this rank among the data-parallel ranks that hold the same state."""

    @property
    def copy_of(self) -> Any:
        """What this rank's weights are a copy of: equal on the ranks whose weights must be the same to the bit. None: no copies."""
        return self.layout.tensor_rank, self.layout.pipeline_rank

    @torch.no_grad()
    def weight_sum(self) -> Tensor:
        """Sum of the bits of this rank's weights, read as integers: int64 scalar on the device, which any one changed bit changes."""
        self.settle()
        total = torch.zeros((), dtype=torch.int64, device=self.layout.device)
        for network in self.networks:
            for parameter in network.parameters():
                local = getattr(parameter, "to_local", lambda same=parameter: same)().detach().reshape(-1)
                for piece in local.view(torch.int32 if local.element_size() == 4 else torch.int16).split(1 << 24):
                    total += piece.sum(dtype=torch.int64)
        return total

    def bind_optimizer(self, holders: dist.ProcessGroup | None, each_alone: bool = False) -> None:
        """Tell an optimizer that needs whole matrices where they lie; to be called when masters and slices are known. `holders`: the ranks
        that together hold one copy of everything; `each_alone`: whether the optimizer is called for one master at a time. Collective."""
        if not isinstance(self.adam, Muon):
            return
        held: list[Held] = [(master, []) for master in self.masters]
        for one in self.slices:
            if is_hidden(one.name):
                whole = one.region.size == one.region.shape[one.region.dim]
                key = one.name, self.layout.tensor_rank if whole else 0  # tensor ranks may each hold all of it
                held[one.master][1].append((one.offset, Piece(key, one.region)))
        steps = [[each] for each in held] if each_alone else [[each for each in held if each[1]]]
        self.adam.bind(steps, holders, self.layout.device)

    @abstractmethod
    def close(self) -> None:
        """Let go of hooks, so that the state goes when the engine does. Nothing works afterwards."""

    @torch.no_grad()
    def initialise(self, config: ModelConfig, seed: int) -> None:
        """Give every master its part of the initial weights, and nothing to what pads them; then publish. For engines that are
        made around a network without weights, so that no rank ever holds more of it than it keeps."""
        for master in self.masters:
            master.zero_()
        for one in self.slices:
            fill(self.masters[one.master].view(-1)[one.offset : one.offset + one.numel], one.name, one.region, config, seed)
        self.publish()

    def fragments(self, ema: Sequence[Tensor] | None = None) -> list[Fragment]:
        """Live views of all that this rank holds, to be written: weights, the optimizer's states and, where given, the averages `ema`,
        parallel to `masters`."""
        self.settle()
        return [fragment for fragment, _ in self._fragments(ema)]

    def owned_fragments(self, ema: Sequence[Tensor] | None = None) -> list[Fragment]:
        """Those that this rank writes: over all ranks, every element of the state exactly once."""
        return share([fragment for fragment, owned in self._fragments(ema) if owned], *self.replicas)

    def _fragments(self, ema: Sequence[Tensor] | None) -> list[tuple[Fragment, bool]]:
        held = [{"weight": master, **self.adam.states(master)} for master in self.masters]
        if ema is not None:
            held = [{**kinds, "ema": average} for kinds, average in zip(held, ema, strict=True)]
        return [
            (Fragment(kind, one.name, one.region, flat.detach().view(-1)[one.offset : one.offset + one.numel]), one.owned)
            for one in self.slices
            for kind, flat in held[one.master].items()
        ]

    def resume(self, step: int, rule: Mapping[str, Any] | None = None) -> None:
        """After the fragments were filled from the checkpoint of `step`: load what was saved of the `rule` which leaves out steps, set
        the optimizer's clock to the updates that were made, publish the weights, and make sure that no hyper-parameter was lost."""
        if rule is not None:
            self.adam.rule.load(rule)
        self.adam.resume(self.masters, updates=step - self.adam.rule.skipped_so_far)
        self.publish()
        decays = {group["weight_decay"] for group in self.adam.param_groups if group["params"]}
        assert decays <= {self.settings.weight_decay, 0.0}, f"the optimizer lost the weight decay of its groups: {decays}"


def owns(parameter: Any, layout: Layout) -> bool:
    """Whether this rank speaks for its part of the parameter among the tensor ranks and stages that hold the same."""
    divided = full_shape(parameter, layout.tensor)[1] >= 0
    return (divided or layout.tensor_rank == 0) and not getattr(parameter, "shared", False)


def master_slices(name: str, parameter: Tensor, layout: Layout, start: int, stop: int, master: int, offset: int) -> list[MasterSlice]:
    """Elements [start, stop) of this rank's flattened parameter as slices: one, or none where all of them are padding."""
    shape, dimension = full_shape(parameter, layout.tensor)
    owned = owns(parameter, layout)
    if dimension < 0:
        return [MasterSlice(name, Region(shape, 0, 0, shape[0], start, stop), master, offset, owned)]
    first = layout.tensor_rank * parameter.shape[dimension]
    size = min(parameter.shape[dimension], shape[dimension] - first)
    stop = min(stop, parameter.numel() // parameter.shape[dimension] * size)
    if size <= 0 or start >= stop:
        return []
    return [MasterSlice(name, Region(shape, dimension, first, size, start, stop), master, offset, owned)]


def global_norm(gradients: Sequence[Tensor], group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """2-norm (fp32, on the device) over the gradients that each rank of `group` owns; None: this rank's alone."""
    square = torch.zeros((), device=device)
    if gradients:
        square = torch.stack(torch._foreach_norm(list(gradients), dtype=torch.float32)).square().sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    return square.sqrt()


def clip(gradients: Sequence[Tensor], norm: Tensor, largest: float) -> None:
    """Scale in place so that the global norm is at most `largest` (0: leave them), without waiting for the device."""
    if largest and gradients:
        torch._foreach_mul_(list(gradients), torch.clamp(largest / (norm + 1e-6), max=1.0))
