"""log p of a continuation given a context, for any objective: exact where L' = 1, a Monte-Carlo bound elsewhere.

The bound is the NELBO of the continuation's tokens alone. The context stays clean in the noisy half, too, so that a block
in which the context ends conditions on its part of it; what follows the continuation in its last block stays masked at all
times. Both are the bound of the same any-order model: the context's tokens come first in the order, the unknown ones last.
Invariants: everything goes through the objective's validation noise (t ~ U[1e-3, 1], weight 1/t, one t per block); the
noise of draw k depends on (seed, k) and the position alone, so that continuations of one context meet the same noise and
their difference has less variance than each; a text's number does not depend on which other texts are scored. Only what it needs is
computed: the network reads rows of which something is masked, as far as the longest text of a forward goes, and answers for that alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bd3_scale.errors import RecipeError
from bd3_scale.evaluation.likelihood import require_likelihood
from bd3_scale.generation.load_model import LoadedNetwork
from bd3_scale.objectives.network_inputs import NetworkInputs


@dataclass(frozen=True)
class _Row:
    """A continuation in a row of the network: tokens [start, stop) of `tokens` int64 [L]."""

    tokens: np.ndarray
    start: int
    stop: int


def continuation_log_likelihood(
    loaded: LoadedNetwork, context: Sequence[int], continuation: Sequence[int], *, draws: int, seed: int = 0, micro_batch: int = 8
) -> float:
    """Lower bound of log p(continuation | BOS, context) in nats, a sum over the continuation's tokens: the mean of `draws` draws.

    The exact value, by one forward, where the objective has no noise. A context that does not fit is cut from the left.
    Raises RecipeError for a continuation that does not fit into the model's context, and for an objective without
    likelihood.
    """
    return next(continuation_log_likelihoods(loaded, [(context, continuation)], draws=draws, seed=seed, micro_batch=micro_batch))


def continuation_log_likelihoods(
    loaded: LoadedNetwork, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, draws: int, seed: int = 0, micro_batch: int = 8
) -> Iterator[float]:
    """The same of each (context, continuation), in their order, each as soon as it is known: `micro_batch` rows in a forward, whichever
    continuations and draws they are of."""
    require_likelihood(loaded)
    if draws < 1 or micro_batch < 1:
        raise RecipeError(f"draws is {draws} and the batch size {micro_batch}, but both must be at least 1")
    draws = 1 if loaded.objective.block_size == 1 else draws
    rows = [_row(loaded, context, continuation) for context, continuation in pairs]
    wanted = [(place, draw) for place, row in enumerate(rows) if row.stop > row.start for draw in range(draws)]
    sums = [0.0] * len(rows)
    told = 0
    for first in range(0, len(wanted), micro_batch):
        batch = wanted[first : first + micro_batch]
        found = _sums(loaded, [rows[place] for place, _ in batch], np.array([draw for _, draw in batch]), seed)
        for (place, _), value in zip(batch, found, strict=True):
            sums[place] += float(value)
        place, draw = batch[-1]
        known = place + (draw == draws - 1)
        yield from (-value / draws for value in sums[told:known])
        told = known
    yield from (-value / draws for value in sums[told:])


def _row(loaded: LoadedNetwork, context: Sequence[int], continuation: Sequence[int]) -> _Row:
    length = loaded.recipe.model.context
    if len(continuation) >= length:
        raise RecipeError(f"a continuation has {len(continuation)} tokens, but the model's context of {length} holds {length - 1} of them")
    known = list(context)[max(0, len(context) + len(continuation) + 1 - length) :]
    start, stop = 1 + len(known), 1 + len(known) + len(continuation)
    tokens = np.full(length, loaded.tokenizer.end_of_text, np.int64)
    tokens[1:stop] = [*known, *continuation]
    return _Row(tokens, start, stop)


@torch.no_grad()
def _sums(loaded: LoadedNetwork, rows: Sequence[_Row], draws: np.ndarray, seed: int) -> np.ndarray:
    """Weighted loss of the continuation of each row under its draw of noise, float64 [rows], nats."""
    objective, clean = loaded.objective, np.stack([row.tokens for row in rows])
    length = clean.shape[1]
    start, stop = (torch.tensor([getattr(row, name) for row in rows])[:, None] for name in ("start", "stop"))
    inputs = objective.validation_inputs(clean, draws, seed)
    if not objective.traits.predicts_next_token:
        tokens, place = inputs.tokens.clone(), torch.arange(length)  # the first L columns are the noisy ones
        noisy = torch.where(place < start, torch.from_numpy(clean), tokens[:, :length])
        tokens[:, :length] = noisy.masked_fill(place >= stop, loaded.tokenizer.mask_id)
        inputs = replace(inputs, tokens=tokens)
    selected, ahead = inputs.selected, int(objective.traits.predicts_next_token)
    row, position = selected // length, selected % length
    asked = (position + ahead >= start[row, 0]) & (position + ahead < stop[row, 0]) & (inputs.weights > 0)
    found = np.zeros(len(rows))
    if not asked.any():
        return found
    kept, place = row[asked].unique(return_inverse=True)
    inputs = _shortened(inputs, kept, int(stop[kept].max()))
    selected = place * inputs.pattern.length + position[asked]
    inputs = replace(inputs, selected=selected, targets=inputs.targets[asked], weights=inputs.weights[asked], sparse=True)
    nll = loaded.network(inputs.to(loaded.device))[1].cpu().double()
    found[kept.numpy()] = np.bincount(place.numpy(), (nll * inputs.weights.double()).numpy())
    return found


def _shortened(inputs: NetworkInputs, rows: Tensor, needed: int) -> NetworkInputs:
    """Inputs of one draw: of some rows, int64 [m'], without positions that their first `needed` ones do not see. L is halved, so that few
    lengths occur, while those fit into whole blocks, two or more; rows that are denoised as a whole are left. The selected positions, their
    targets and weights are the caller's to choose."""
    pattern = inputs.pattern
    length, size = pattern.length, pattern.block_size if pattern.kind == "block_diffusion" else 1
    while pattern.kind != "full" and length % (2 * size) == 0 and length // 2 >= max(needed, 2 * size):
        length //= 2
    short = replace(pattern, length=length, block_size=min(pattern.block_size, length))
    row = torch.arange(length)
    kept = torch.cat([row, pattern.length + row[: short.clean_rows]])
    return replace(
        inputs,
        tokens=inputs.tokens[rows][:, kept],
        positions=inputs.positions[kept],
        dropout_keys=inputs.dropout_keys[rows],
        pattern=short,
        denoised=inputs.denoised[rows.numpy(), : inputs.denoised.shape[1] * length // pattern.length],
        counted=inputs.counted[rows.numpy()],
        segments=None if inputs.segments is None else inputs.segments[rows][:, kept],
        noise_levels=None if inputs.noise_levels is None else inputs.noise_levels[rows],
    )
