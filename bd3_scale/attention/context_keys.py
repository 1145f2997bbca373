"""Context parallelism inside of a layer: the keys and values that a rank asks for, brought from the ranks of its row.

Everything else of a layer is row by row and needs no other rank. Of block diffusion the clean half alone travels, of the key/value heads
that the tensor rank has; noisy rows see noisy ones of their own block only, which is not cut (see `attention.mask`). In the
backward the gradients of what was gathered are summed on the rank that it came from.

Or nothing is gathered (`AttentionPattern.ring`): what travels goes from each rank to the next, so that every rank meets that of every
other once and holds two ranks' at a time; in the backward it goes round once more, with its gradients, which then are home.

Invariant: rank r's rows lie in its pieces' order, those of all ranks in the order of their positions, which is what kernels expect.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.megatron_core import gather_from_sequence_parallel_region, parallel_state


def all_keys(k: Tensor, v: Tensor, pattern: AttentionPattern) -> tuple[Tensor, Tensor]:
    """k, v [pattern.rows, batch, kv_heads, d], as this rank holds them -> [pattern.key_rows, ...], as `pattern`'s rows ask for them."""
    if pattern.context_ranks == 1 or pattern.ring:
        return k, v
    own, (own_k, own_v) = pattern.own_keys, (t[: pattern.own_keys] for t in (k, v))
    travelling = torch.cat([k[own:], v[own:]], -1)
    gathered = gather_from_sequence_parallel_region(travelling, group=parallel_state.get_context_parallel_group())
    all_k, all_v = in_order(gathered, pattern).chunk(2, -1)
    return torch.cat([own_k, all_k]), torch.cat([own_v, all_v])


def in_order(gathered: Tensor, pattern: AttentionPattern) -> Tensor:
    """What travelled, rank by rank, [C * (pattern.rows - pattern.own_keys), ...] -> stream by stream in the order of positions."""
    pieces = gathered.unflatten(0, (pattern.context_ranks, -1, len(pattern.pieces), len(pattern.pieces[0])))
    early, late = pieces[:, :, 0], pieces[:, :, 1:].transpose(1, 2).flip(0).flatten(0, 1)
    return torch.cat([early, late]).transpose(0, 1).flatten(0, 2)


def hop(x: Tensor, pattern: AttentionPattern) -> Tensor:
    """x goes to the next context rank of the ring: what the one before gives, of the same shape. All ranks call it together."""
    # An exchange of all with all that is empty but for the neighbours: compiled code knows no sending and receiving.
    ranks, rank, arrived = pattern.context_ranks, pattern.context_rank, torch.empty_like(x)
    sent, received = ([len(x) if one == other % ranks else 0 for one in range(ranks)] for other in (rank + 1, rank - 1))
    dist.all_to_all_single(arrived, x.contiguous(), received, sent, group=parallel_state.get_context_parallel_group())
    return arrived


def travelling(k: Tensor, v: Tensor, pattern: AttentionPattern) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(step, k, v [batch, kv_heads, n, d]) of what travels of every other rank, `pattern.before(step)`'s; k, v as this rank holds them."""
    both = torch.stack([k[pattern.own_keys :], v[pattern.own_keys :]])
    for step in range(1, pattern.context_ranks):
        both = hop(both, pattern)
        yield step, *both.permute(0, 2, 3, 1, 4)


def travelling_with_gradients(
    k: Tensor, v: Tensor, grad_k: Tensor, grad_v: Tensor, pattern: AttentionPattern
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """The same, each with the fp32 gradients of what is there, to be added to; at the end `grad_k` and `grad_v` have got theirs.

    They are those of this rank's own keys and values, and of the layout of what travels.
    """
    away = None
    for step, other_k, other_v in travelling(k, v, pattern):
        # Those before have added theirs; the rank after the owner begins.
        away = other_k.new_zeros(2, *other_k.shape) if away is None else hop(away, pattern)
        grads = away.float()
        yield step, other_k, other_v, grads[0], grads[1]
        away = grads.to(k.dtype)
    if away is not None:
        away = hop(away, pattern)
        grad_k += away[0]
        grad_v += away[1]
