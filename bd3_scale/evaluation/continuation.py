"""log p of a continuation given a context, for any objective: exact where L' = 1, a Monte-Carlo bound elsewhere.

The bound is the NELBO of the continuation's tokens alone. The context stays clean in the noisy half, too, so that a block
in which the context ends conditions on its part of it; what follows the continuation in its last block stays masked at all
times. Both are the bound of the same any-order model: the context's tokens come first in the order, the unknown ones last.
Invariants: everything goes through the objective's validation noise (t ~ U[1e-3, 1], weight 1/t, one t per block); the
noise of draw k depends on (seed, k) and the position alone, so that continuations of one context meet the same noise and
their difference has less variance than each; a text's number does not depend on which other texts are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from bd3_scale.errors import RecipeError
from bd3_scale.evaluation.likelihood import require_likelihood
from bd3_scale.generation.load_model import LoadedNetwork


@torch.no_grad()
def continuation_log_likelihood(
    loaded: LoadedNetwork, context: Sequence[int], continuation: Sequence[int], *, draws: int, seed: int = 0, micro_batch: int = 8
) -> float:
    """Lower bound of log p(continuation | BOS, context) in nats, a sum over the continuation's tokens: the mean of `draws` draws.

    The exact value, by one forward, where the objective has no noise. A context that does not fit is cut from the left.
    Raises RecipeError for a continuation that does not fit into the model's context, and for an objective without
    likelihood.
    """
    require_likelihood(loaded)
    length, objective = loaded.recipe.model.context, loaded.objective
    if draws < 1:
        raise RecipeError(f"draws is {draws} but must be at least 1")
    if len(continuation) >= length:
        raise RecipeError(f"a continuation has {len(continuation)} tokens, but the model's context of {length} holds {length - 1} of them")
    if not continuation:
        return 0.0
    draws = 1 if objective.block_size == 1 else draws
    known = list(context)[max(0, len(context) + len(continuation) + 1 - length) :]
    start, stop = 1 + len(known), 1 + len(known) + len(continuation)
    row = np.full(length, loaded.tokenizer.end_of_text, np.int64)
    row[1:stop] = [*known, *continuation]
    sums = [
        value
        for first in range(0, draws, micro_batch)
        for value in _sums(loaded, row, start, stop, np.arange(first, min(first + micro_batch, draws)), seed)
    ]
    return -float(np.mean(sums))


def _sums(loaded: LoadedNetwork, row: np.ndarray, start: int, stop: int, draws: np.ndarray, seed: int) -> np.ndarray:
    """Weighted loss of tokens [start, stop) of `row` under each draw of noise, float64 [draws], nats."""
    objective, length = loaded.objective, len(row)
    inputs = objective.validation_inputs(np.tile(row, (len(draws), 1)), draws, seed)
    if not objective.traits.predicts_next_token:
        tokens = inputs.tokens.clone()  # the first L columns are the noisy ones
        tokens[:, :start] = torch.from_numpy(row[:start])
        tokens[:, stop:length] = loaded.tokenizer.mask_id
        inputs = replace(inputs, tokens=tokens)
    predicted = inputs.selected + int(objective.traits.predicts_next_token)
    position = predicted % length
    inside = (position >= start) & (position < stop)
    inputs = replace(inputs, weights=torch.where(inside, inputs.weights, 0.0))
    nll = loaded.network(inputs.to(loaded.device))[1].cpu().double()
    weighted = torch.where(inputs.weights > 0, nll * inputs.weights.double(), 0.0)
    return np.bincount((predicted // length).numpy(), weighted.numpy(), minlength=len(draws))[: len(draws)]
