"""Attention in a ring by a kernel that gives its log-sum-exp and is differentiable in both: FlexAttention.

A rank attends to what it holds, then to what travels of each other rank (`AttentionPattern.met`), and merges the parts by their
log-sum-exp: out = sum of w_i out_i, w_i = exp(lse_i - lse). Nothing of the parts is kept. In the backward the others' keys come again, with
the gradients that are theirs, and each part is computed once more, because torch gives a kernel's backward to autograd alone. Of the merged
output the gradient of out_i is w_i grad, that of lse_i is w_i grad . (out_i - out): this is exact.

Invariant: a row sees itself, so that the log-sum-exp of what its rank holds is a number. A row that sees nothing of another rank's part has
out_i = 0 and lse_i = -inf there, thus w_i = 0, and neither it nor its gradients are asked what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bd3_scale.attention.context_keys import travelling, travelling_with_gradients
from bd3_scale.attention.mask import AttentionPattern

Attend = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]
"""(q [batch, heads, n, d], k, v [batch, kv_heads, m, d], mask) -> output [batch, heads, n, d], natural log-sum-exp [batch, heads, n]."""


def heads_first(x: Tensor) -> Tensor:
    """View [batch, heads, rows, d] of [rows, batch, heads, d]."""
    return x.permute(1, 2, 0, 3)


class FlexRing(torch.autograd.Function):
    """q [query_rows, batch, heads, d] and k, v [rows, batch, kv_heads, d] that this rank holds -> [query_rows, batch, heads, d].
    `masks`: those of all steps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, attend: Attend, masks: Sequence[Any]) -> Tensor:
        queries = heads_first(q)
        own, lse = attend(queries, heads_first(k), heads_first(v), masks[0])
        merged = own.float()
        for step, other_k, other_v in travelling(k, v, pattern):
            part, part_lse = attend(queries, other_k, other_v, masks[step])
            merged = torch.lerp(merged, part.float(), torch.sigmoid(part_lse - lse)[..., None])
            lse = torch.logaddexp(lse, part_lse)
        out = merged.to(q.dtype).permute(2, 0, 1, 3)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pattern, ctx.attend, ctx.masks = pattern, attend, masks
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        queries, grad = heads_first(q), heads_first(grads[0]).float()
        along = (grad * heads_first(out)).sum(-1)

        def part_of(other_k: Tensor, other_v: Tensor, mask: Any) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                given = [t.detach().requires_grad_() for t in (queries, other_k, other_v)]
                part, part_lse = ctx.attend(*given, mask)
            weight = torch.exp(part_lse.detach() - lse)
            of_part = (weight[..., None] * grad).to(part.dtype)
            of_lse = (of_part.float() * part.detach()).sum(-1) - weight * along
            return torch.autograd.grad((part, part_lse), given, (of_part, of_lse))

        # In fp32: a row adds up what comes back from every rank.
        grad_q, grad_k, grad_v = (t.float() for t in part_of(heads_first(k), heads_first(v), ctx.masks[0]))
        home_k, home_v = (t[:, :, ctx.pattern.own_keys :] for t in (grad_k, grad_v))
        for step, other_k, other_v, away_k, away_v in travelling_with_gradients(k, v, home_k, home_v, ctx.pattern):
            of_q, of_k, of_v = part_of(other_k, other_v, ctx.masks[step])
            grad_q += of_q
            away_k += of_k
            away_v += of_v
        made = (t.permute(2, 0, 1, 3).to(given.dtype) for t, given in zip((grad_q, grad_k, grad_v), (q, k, v), strict=True))
        return (*made, None, None, None)
