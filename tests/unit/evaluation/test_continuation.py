"""log p of a continuation: exact where there is no noise, else right on average, and blind to what it must not see."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bd3_scale.errors import RecipeError
from bd3_scale.evaluation.continuation import continuation_log_likelihood, continuation_log_likelihoods
from bd3_scale.generation.load_model import LoadedNetwork, load_network
from bd3_scale.objectives.network_inputs import NetworkInputs

Checkpoints = Callable[..., Path]
CONTEXT, CONTINUATION = list(b"abcde"), list(b"fgh")


def next_token_log_p(loaded: LoadedNetwork, tokens: list[int], first: int) -> float:
    """log p(tokens[first:] | those before), a forward per token."""
    total = 0.0
    for stop in range(first, len(tokens)):
        mask = torch.ones(stop, stop, dtype=torch.bool).tril()
        logits = loaded.network.decode(torch.tensor([tokens[:stop]]), torch.arange(stop), None, mask, last=1)[0, 0]
        total += float(logits.double().log_softmax(-1)[tokens[stop]])
    return total


def test_next_token_networks_give_the_exact_value(checkpoint: Checkpoints, world_of_one: object) -> None:
    loaded = load_network(checkpoint(kind="ar"), device="cpu")
    expected = next_token_log_p(loaded, [256, *CONTEXT, *CONTINUATION], 1 + len(CONTEXT))
    assert continuation_log_likelihood(loaded, CONTEXT, CONTINUATION, draws=9) == pytest.approx(expected, rel=1e-5)
    # Too long a context loses its beginning: 15 tokens and the BOS fill the context of 16.
    long = list(b"0123456789abcdef")
    cut = next_token_log_p(loaded, [256, *long[-12:], *CONTINUATION], 13)
    assert continuation_log_likelihood(loaded, long, CONTINUATION, draws=1) == pytest.approx(cut, rel=1e-5)
    assert continuation_log_likelihood(loaded, long, [], draws=1) == 0.0
    with pytest.raises(RecipeError, match="holds 15"):
        continuation_log_likelihood(loaded, [], long, draws=1)


@pytest.mark.parametrize("objective", [{"block_size": 4}, {"kind": "mdlm"}])
def test_one_token_has_no_order_so_its_bound_is_tight(objective: dict, checkpoint: Checkpoints, world_of_one: object) -> None:
    """Position 6 of [BOS, context of 5, token]: its block is 4..7, of which 4 and 5 are context and 7 is unknown for good."""
    loaded = load_network(checkpoint(**objective), device="cpu")
    mask, size = loaded.tokenizer.mask_id, loaded.objective.block_size
    row = [256, *CONTEXT, *[mask] * (max(8, size) - 6)]
    positions = torch.arange(len(row))
    visible = positions[None] // size <= positions[:, None] // size
    logits = loaded.network.decode(torch.tensor([row]), positions, None, visible, last=len(row))[0, 6]
    exact = float(logits.double().log_softmax(-1)[ord("f")])
    values = np.array([continuation_log_likelihood(loaded, CONTEXT, [ord("f")], draws=1, seed=seed) for seed in range(400)])
    assert values.min() < exact < values.max() == 0.0  # the token is masked, with weight 1 / t, or it is not
    hit = -values[values < 0] / -exact
    assert np.allclose(values.mean(), exact, atol=5 * values.std() / math.sqrt(len(values))) and (hit >= 1 - 1e-4).all()


def test_draws_are_averaged_and_keyed(checkpoint: Checkpoints, world_of_one: object) -> None:
    loaded = load_network(checkpoint(block_size=4), device="cpu")
    whole = continuation_log_likelihood(loaded, CONTEXT, CONTINUATION, draws=6, micro_batch=6)
    assert continuation_log_likelihood(loaded, CONTEXT, CONTINUATION, draws=6, micro_batch=4) == pytest.approx(whole, rel=1e-6)
    assert continuation_log_likelihood(loaded, CONTEXT, CONTINUATION, draws=6, seed=1) != whole
    with pytest.raises(RecipeError, match="draws is 0"):
        continuation_log_likelihood(loaded, CONTEXT, CONTINUATION, draws=0)


@pytest.mark.parametrize("objective", [{"block_size": 4}, {"block_size": 4, "clean_half": "causal"}, {"kind": "mdlm"}, {"kind": "ar"}])
def test_rows_are_read_as_far_as_is_asked(objective: dict, checkpoint: Checkpoints, world_of_one: object) -> None:
    """A short text alone, in rows of half the context where they have blocks, and beside a long one: the same number."""
    loaded = load_network(checkpoint(**objective), device="cpu")
    read: list[int] = []
    forward = loaded.network.forward

    def noted(inputs: NetworkInputs) -> Any:
        read.append(inputs.pattern.length)
        return forward(inputs)

    loaded.network.forward = noted  # type: ignore[method-assign]
    short, long = (CONTEXT[:2], CONTINUATION), (CONTEXT, list(b"fghijklmn"))
    (alone,) = continuation_log_likelihoods(loaded, [short], draws=6, micro_batch=3)
    assert set(read) == {16 if objective.get("kind") == "mdlm" else 8}
    first, _ = continuation_log_likelihoods(loaded, [short, long], draws=6, micro_batch=12)
    assert read[-1] == 16 and alone == pytest.approx(first, rel=1e-5) and alone < 0
