"""The cross-entropy of a chunk of logits and its gradient in two passes, each of which a compiler makes one kernel.

megatron-core's form copies the logits to fp32 and goes over the copy seven times: some 52 bytes for each logit of bf16, more time than
the head's products take where the network is narrow. Here one function reads the logits for three numbers of each position (maximum,
sum of exponentials, logit of the target), which the tensor ranks combine, and another puts the gradient in the logits' own place: eight
bytes for each logit at most, and no copy of them.

Invariants: all arithmetic is in fp32, and a logit of -inf (MASK, padding) has the gradient 0; where weights are 0 the gradient is
exactly 0; nothing depends on how many positions a chunk has, so that the last chunk, and another micro-batch, compile nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from bd3_scale.model.compiling import compiled_whole, of_any_size


def statistics(logits: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [n, V of this rank]; place int64 [n]: of the target among them, -1 where another rank has it. Returns fp32 [n] each: the
    maximum, the sum of exp(logit - maximum), and the target's logit or 0."""
    numbers = logits.float()
    top = numbers.amax(-1)
    total = (numbers - top[:, None]).exp().sum(-1)
    target = logits.gather(-1, place.clamp_min(0)[:, None])[:, 0].float()
    return top, total, torch.where(place >= 0, target, 0.0)


def put_gradient(logits: Tensor, place: Tensor, top: Tensor, total: Tensor, weights: Tensor) -> None:
    """Overwrite logits with weights * (softmax - 1 at the target); `top` and `total` as above, of all ranks."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    probability = (logits.float() - top[:, None]).exp() / total[:, None]
    logits.copy_((probability - (ids == place[:, None]).float()) * weights[:, None])


class FusedCrossEntropy:
    """For a rank whose ids begin at `first_id`, in a tensor-parallel group of megatron.core.parallel_state where `divided`."""

    def __init__(self, first_id: int, divided: bool, backend: str | None = None) -> None:
        """`backend`: as in `compiled_whole`."""
        self.first_id, self.divided, self.backend = first_id, divided, backend

    def __call__(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """logits [n, V of this rank], -inf where impossible; targets int64 [n], ids of the whole vocabulary; weights fp32 [n], or None
        where no gradient is wanted. Returns (nll fp32 [n], gradient of the weighted sum: the same memory as the logits)."""
        place = targets - self.first_id
        place = torch.where((place >= 0) & (place < logits.shape[-1]), place, -1)
        logits, place = of_any_size(logits, 0), of_any_size(place, 0)
        top, total, target = _compiled(statistics, self.backend)(logits, place)
        if self.divided:
            group = parallel_state.get_tensor_model_parallel_group()
            highest = top.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            # A rank may hold padding alone, and nothing but -inf.
            sums = torch.stack([torch.where(top.isneginf(), 0.0, total * (top - highest).exp()), target])
            dist.all_reduce(sums, group=group)
            top, (total, target) = highest, sums.unbind()
        nll = total.log() - (target - top)
        if weights is None:
            return nll, None
        rows = (of_any_size(numbers, 0) for numbers in (top, total, weights))
        _compiled(put_gradient, self.backend)(logits, place, *rows)
        return nll, logits


@lru_cache
def _compiled(function: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
    return compiled_whole(function, backend=backend)
