"""The expected embedding of noised words, softmax(x_t) E, without a tensor of positions x words.

Some positions at a time the masses of all words are made from the keys of the noise (`objectives.simplex`), multiplied with the
embedding and let go. They depend on no parameter: the gradient is that of the embedding alone, for which the backward makes the
masses of each chunk once more. Nothing but keys, levels and sums is kept.

Where the vocabulary is divided, each rank has the mean over its own words and their total mass: the whole is the mean of these
means, each weighted by its share of the mass, and the ranks exchange one number per position and one sum of vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bd3_scale.objectives.simplex import SimplexNoise, masses

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Masses alive at a time, by device; making them takes about three times their memory."""
SMALLEST = 1e-30
"""Instead of a mass of no words."""


def expected_embedding(weight: Tensor, tokens: Tensor, noise: SimplexNoise, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Mean embedding of the words `first` to `last` - 1 under their masses, and the sum of these.

    weight [at least last - first, hidden], whose row i is word first + i; tokens int64 [m, n], any ids; `noise` of that shape ->
    [m * n, hidden] in the weight's type, row by row, and fp32 [m * n] without gradient (0 where there are no words).
    """
    if last <= first:
        # Still a function of the weight: whoever reduces gradients waits for one of every parameter.
        nothing = weight[:1].sum() * 0.0
        return nothing.expand(tokens.numel(), weight.shape[1]), torch.zeros(tokens.numel(), device=weight.device)
    return _ExpectedEmbedding.apply(weight, tokens.flatten(), *noise.flat(), first, last)


class _ExpectedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, tokens: Tensor, keys: Tensor, signal: Tensor, spread: Tensor, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        mean = torch.empty(len(tokens), weight.shape[1], dtype=weight.dtype, device=weight.device)
        total = torch.empty(len(tokens), device=weight.device)
        for part in _parts(len(tokens), last - first, weight.device):
            mass = masses(tokens[part], keys[part], signal[part], spread[part], first, last)
            total[part] = mass.sum(-1)
            mass.div_(total[part].clamp_min(SMALLEST)[:, None])
            torch.mm(mass.to(weight.dtype), weight[: last - first], out=mean[part])
        ctx.save_for_backward(tokens, keys, signal, spread, total)
        ctx.words, ctx.shape, ctx.dtype = (first, last), weight.shape, weight.dtype
        ctx.mark_non_differentiable(total)
        return mean, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, keys, signal, spread, total = ctx.saved_tensors
        first, last = ctx.words
        gradient = torch.zeros(ctx.shape, dtype=torch.float32, device=total.device)
        of_words = gradient[: last - first]
        for part in _parts(len(tokens), last - first, total.device):
            mass = masses(tokens[part], keys[part], signal[part], spread[part], first, last)
            mass.div_(total[part].clamp_min(SMALLEST)[:, None])
            if ctx.dtype == torch.float32:
                of_words.addmm_(mass.t(), grads[0][part])
            else:
                of_words += mass.to(ctx.dtype).t() @ grads[0][part]
            del mass
        return gradient.to(ctx.dtype), *[None] * 6


def _parts(positions: int, words: int, device: torch.device) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS.get(device.type, 1 << 22) // words)
    return (slice(start, start + step) for start in range(0, positions, step))
