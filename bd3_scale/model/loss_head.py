"""Linear cross-entropy or score entropy on selected positions: chunked, weighted, over a vocabulary that may be divided.

Logits exist for one chunk of positions at a time; with gradients wanted, the chunk's gradient is formed while its
logits are at hand, so that nothing of shape (tokens, V) is ever kept. The cross-entropy of a chunk is megatron-core's, or
(`model.head_loss=fused`) one that is compiled to move a sixth of the memory (`FusedCrossEntropy`).

Score entropy (Lou et al. 2024; what is left of it for a masked position is derived in `objectives.sedd`) is
    A - 1 - z_target + log N,   A = mean of exp(z) over the N ids of text,
in which the log-scores z are not normalised: it is the cross-entropy of their softmax + (A - 1 - log A). Without a maximum to
agree on, the vocabulary's parts need to exchange one sum.

Invariants: MASK, the last id, has probability 0 (its logit is -inf; SUBS, paper section 3.1), and so has the padding of
the vocabulary behind it; positions of weight 0 contribute exactly 0; the sum is not normalised here (the caller divides
by the global number of data tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bd3_scale.compiling import compiled_whole, of_any_size
from bd3_scale.costs.sizes import positions_per_chunk
from bd3_scale.megatron_core import parallel_state, reduce_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from bd3_scale.model.layers import TensorParallelFactory
from bd3_scale.recipe.schema import ModelConfig

ChunkLoss = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""(logits [n, V of this rank], targets int64 [n], weights fp32 [n] or None) -> (losses fp32 [n], with weights the gradient of their
weighted sum with respect to the logits, which may be gone)."""


class Head(nn.Module):
    """The output layer. Its weight is its own [V / tensor, hidden] or the embedding's."""

    def __init__(
        self, config: ModelConfig, factory: TensorParallelFactory, vocabulary: int, mask_id: int, embedding: nn.Parameter | None
    ) -> None:
        super().__init__()
        if embedding is None:
            self.weight, self.bias = factory.head(config.hidden, vocabulary, config.head_bias)
        else:
            self.weight = embedding
            self.bias = factory.head(1, vocabulary, True)[1] if config.head_bias else None
        if mask_id != vocabulary - 1:
            raise ValueError(f"MASK is {mask_id} but must be the last of the {vocabulary} ids")
        self.factory, self.vocabulary = factory, vocabulary
        self.first_id = factory.tensor_rank * factory.padded(vocabulary) // factory.tensor
        # MASK and the padding behind it, as ids of this rank.
        self.impossible = max(0, mask_id - self.first_id)
        self.config, self.fused = config, FusedCrossEntropy(self.first_id, factory.tensor > 1)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None, normalised: bool = True) -> Any:
        """hidden [n, hidden]. With targets and weights [n]: (weighted sum, nll [n] without gradient), fp32; not `normalised`: score
        entropies instead of nll. Without: logits [n, V], fp32, -inf at MASK, the same on every tensor rank."""
        if targets is None or weights is None:
            logits = self.factory.whole_logits(_logits(hidden, self.weight, self.bias, self.impossible))
            return logits[:, : self.vocabulary].float()
        gradients = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        hidden = self.factory.before_head(hidden)
        loss: ChunkLoss = self.fused
        fused = normalised and self.config.head_loss == "fused"
        if not fused:
            loss = partial(_by_autograd, vocab_parallel_cross_entropy if normalised else self._score_entropy)
        step = positions_per_chunk(len(self.weight), hidden.device.type, fused)
        return _LinearLoss.apply(hidden, self.weight, self.bias, targets, weights, self.impossible, gradients, loss, step)

    def _score_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """As above: logits [n, V of this rank], -inf at MASK and padding; targets int64 [n] -> fp32 [n]."""
        words, logits = self.vocabulary - 1, logits.float()
        here = targets - self.first_id
        held = (here >= 0) & (here < logits.shape[-1])
        target = logits.gather(-1, here.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
        part = logits.exp().sum(-1) / words - torch.where(held, target, 0.0)
        return (reduce_from_tensor_model_parallel_region(part) if self.factory.tensor > 1 else part) + (math.log(words) - 1.0)


def _by_autograd(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if weights is None:
        return loss(logits, targets), None
    with torch.enable_grad():
        logits.requires_grad_()
        losses = loss(logits, targets)
        (gradient,) = torch.autograd.grad(losses, logits, weights)
    return losses.detach(), gradient


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, impossible: int) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits[:, impossible:] = float("-inf")
    return logits


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        impossible: int,
        gradients: bool,
        loss: ChunkLoss,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        if gradients:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = None
            grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            logits = _logits(hidden[part], weight, bias, impossible)
            nll[part], grad_logits = loss(logits, targets[part], weights[part] if gradients else None)
            if grad_logits is None:
                continue
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is None:
                grad_weight = (grad_logits.t() @ hidden[part]).float()
            elif grad_weight.dtype == grad_logits.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden[part])
            else:
                grad_weight += grad_logits.t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
            del logits, grad_logits
        if gradients:
            if grad_weight is None:  # no position at all
                grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            ctx.gradients = grad_hidden, grad_weight, grad_bias, weight.dtype
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients are used once: a second backward through the same graph is not possible, nor needed.
        grad_hidden, grad_weight, grad_bias, dtype = ctx.gradients
        del ctx.gradients
        scale = grads[0]
        grad_bias = None if grad_bias is None else grad_bias.mul_(scale).to(dtype)
        scaled = grad_weight if dtype == grad_weight.dtype else grad_weight.new_empty(grad_weight.shape, dtype=dtype)
        torch.mul(grad_weight, scale, out=scaled)  # in fp32, rounded on its way out
        return (grad_hidden.float() * scale).to(grad_hidden.dtype), scaled, grad_bias, *[None] * 6


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
    """The cross-entropy of a chunk of logits and its gradient in two passes, each of which a compiler makes one kernel. For a rank whose
    ids begin at `first_id`, in a tensor-parallel group of megatron.core.parallel_state where `divided`.

    megatron-core's form copies the logits to fp32 and goes over the copy seven times: some 52 bytes for each logit of bf16, more time
    than the head's products take where the network is narrow. Here one function reads the logits for three numbers of each position
    (maximum, sum of exponentials, logit of the target), which the tensor ranks combine, and another puts the gradient in the logits' own
    place: eight bytes for each logit at most, and no copy of them.

    Invariants: all arithmetic is in fp32, and a logit of -inf (MASK, padding) has the gradient 0; where weights are 0 the gradient is
    exactly 0; nothing depends on how many positions a chunk has, so that the last chunk, and another micro-batch, compile nothing anew.
    """

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
