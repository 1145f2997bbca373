"""Texts of a loaded network, by one process or by the tensor-parallel ranks that share it.

Invariant: the ranks of one group never part: their logits are gathered, so they have the same bits, and their requests and their texts
are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bd3_scale.errors import RecipeError, TrainingError
from bd3_scale.generation.cached_forward import one_block
from bd3_scale.generation.sampler import Result, check, generate, resolved
from bd3_scale.generation.token_sampling import SamplingOptions

if TYPE_CHECKING:
    from bd3_scale.data.tokenizer import Tokenizer
    from bd3_scale.generation.load_model import LoadedNetwork


def generate_tokens(
    loaded: LoadedNetwork,
    *,
    prompts: Sequence[str | Sequence[int]] | None = None,
    batch: int | None = None,
    length: int | None = None,
    seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    top_p: float = 1.0,
    nucleus: str = "keep",
    temperature: float = 1.0,
    threshold: float | None = None,
    corrections: int | None = None,
    minimum_entropy: float | None = None,
    stop_at_end_of_text: bool = True,
    first_row: int = 0,
    use_cache: bool = True,
) -> Result:
    """Texts of a loaded network; see `SamplingOptions` for how tokens are chosen.

    `prompts`: texts, or their ids (those of a conversation: `Tokenizer.encode_chat`).
    `length`: tokens per text, with the BOS and the prompt; default: the training context; longer ones slide over it (by half
    windows where a row is one block).
    `batch`: texts, default one per prompt; a multiple of the prompts gives each of them as many texts, side by side.
    Row r of the result is row `first_row` + r of `seed`, so that many texts can be made in several calls.
    Collective among `loaded.peers`: all must ask for the same, and all get the same result (but for `seconds`).
    Raises RecipeError for options that cannot work and for peers that ask for different texts, CheckpointError for a network
    that gives no numbers, TrainingError where peers compute different texts.
    """
    chosen = SamplingOptions(sampler, steps, threshold, corrections, temperature, top_p, nucleus, minimum_entropy)
    options, length = checked(loaded, chosen, length, seed)
    tokens, known = _given(loaded.tokenizer, list(prompts or [""]), batch, length)
    end_of_text = loaded.tokenizer.end_of_text if stop_at_end_of_text else None
    request = repr((options, end_of_text, seed, first_row, use_cache, known.shape, known.tobytes(), tokens.tobytes()))
    if not alike(loaded, request.encode()):
        raise RecipeError(
            "the tensor-parallel ranks of one network were asked for different texts; call all with the same prompts, options and seed"
        )
    loaded.network.eval()
    result = generate(
        loaded.network,
        loaded.objective,
        tokens,
        known,
        options,
        mask_id=loaded.tokenizer.mask_id,
        end_of_text=end_of_text,
        seed=seed,
        first_row=first_row,
        use_cache=use_cache,
        device=loaded.device,
    )
    if not alike(loaded, b"".join(row.tobytes() for row in result.tokens)):
        raise TrainingError(
            "the tensor-parallel ranks drew different tokens from the same logits, so their devices do not compute alike; "
            "start as many processes on devices of one kind, or one"
        )
    return result


def checked(loaded: LoadedNetwork, options: SamplingOptions, length: int | None, seed: int) -> tuple[SamplingOptions, int]:
    """Options with a sampler, and tokens per text (None: the training context). Raises RecipeError where this network cannot do that."""
    options = resolved(loaded.objective, options)
    length = loaded.recipe.model.context if length is None else length
    check(loaded.objective, options, length)
    if loaded.recipe.model.positions == "learned" and length > loaded.recipe.model.context and not one_block(loaded.objective):
        raise RecipeError(
            f"length is {length}, but this model learned the positions of {loaded.recipe.model.context} tokens and no more; "
            f"set at most {loaded.recipe.model.context}"
        )
    if not 0 <= seed < 2**64:
        raise RecipeError(f"seed is {seed} but must lie in [0, 2^64); set 0, for example")
    return options, length


def alike(loaded: LoadedNetwork, content: bytes) -> bool:
    """Whether all ranks that share the network have the same; each learns it."""
    return len(set(loaded.peers.all_gather(hashlib.sha256(content).digest()))) == 1


def _given(tokenizer: Tokenizer, prompts: list[str | Sequence[int]], batch: int | None, length: int) -> tuple[np.ndarray, np.ndarray]:
    """What is known before: tokens int64 [B, length] with the BOS and the prompts, and bool [B, length] where they are."""
    batch = len(prompts) if batch is None else batch
    if batch < 1 or batch % len(prompts):
        raise RecipeError(f"the batch size is {batch} but must be a multiple of the {len(prompts)} prompt(s); set {len(prompts)}")
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    each = [given_of(tokenizer, given, place, length) for place, given in enumerate(ids)]
    tokens, known = (np.repeat(np.stack(part), batch // len(prompts), axis=0) for part in zip(*each, strict=True))
    return tokens, known


def given_of(tokenizer: Tokenizer, ids: list[int], place: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of the prompt at `place`: int64 and bool [length]. Raises RecipeError where nothing is left to write."""
    if ids and len(ids) + 1 >= length:
        raise RecipeError(
            f"prompt {place + 1} has {len(ids)} tokens, and with the one that begins a text nothing of the length {length} is left; "
            f"set length to {len(ids) + 2} or more"
        )
    tokens = np.full(length, tokenizer.end_of_text, np.int64)
    tokens[1 : len(ids) + 1] = ids
    return tokens, np.arange(length) <= len(ids)
