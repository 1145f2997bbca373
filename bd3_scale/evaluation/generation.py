"""Many texts of a checkpoint, how long they are, how varied, what they cost and what a judge thinks of them.

Texts are made in batches that the replicas share; text r depends on (seed, r) alone, not on who made it. Invariants: NFE is
counted at the network itself, every call of it, and must be what the sampler reports; an empty text has no perplexity and
is counted apart; per-sample and pooled perplexity are different numbers and both are given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from bd3_scale.distributed.layout import Layout
from bd3_scale.errors import RecipeError, TrainingError
from bd3_scale.evaluation.judge import Judge
from bd3_scale.generation.generate import generate_tokens
from bd3_scale.generation.load_model import LoadedNetwork
from bd3_scale.generation.token_sampling import histogram_entropy


@dataclass(frozen=True)
class Text:
    """One generated text; a line of samples.jsonl."""

    row: int
    """Its number: with `seed` it says which text this is (`generate_tokens(seed=seed, first_row=row)`)."""
    seed: int
    text: str
    tokens: list[int]
    """Ids, BOS first, without the token that ended it."""
    stop: str
    """end_of_text | entropy | length."""
    nfe: int
    """Calls of the network for the batch that it was made in."""
    entropy: float | None
    """Nats, of the histogram of its own tokens; None for an empty text."""
    judge_nll: float | None
    """Sum over the judge's tokens, nats; None without a judge."""
    judge_tokens: int | None

    @property
    def length(self) -> int:
        """Tokens without the BOS."""
        return len(self.tokens) - 1

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


@contextmanager
def counted_calls(network: Any) -> Iterator[list[int]]:
    """A list whose one number counts the calls of `network.decode`, which is all that sampling calls, within the block."""
    calls, decode = [0], network.decode

    def counted(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        return decode(*arguments, **named)

    network.decode = counted
    try:
        yield calls
    finally:
        del network.decode  # the attribute of this instance: the method of its class is there again


def generate_texts(
    loaded: LoadedNetwork,
    layout: Layout,
    *,
    samples: int,
    batch: int,
    seed: int,
    judge: Judge | None = None,
    progress: bool = False,
    **options: Any,
) -> list[Text]:
    """`samples` texts in their order, on every rank; `options` as of `generate_tokens`. Collective in the world.

    Raises RecipeError for options that cannot work, TrainingError where the sampler's NFE is not that of the network.
    """
    if samples < 1 or batch < 1:
        raise RecipeError(f"samples is {samples} and the batch size {batch}, but both must be at least 1")
    starts = range(layout.data_rank * batch, samples, layout.data * batch)
    mine: list[Text] = []
    with tqdm(total=len(starts), unit="batch", disable=None if progress and layout.is_main_rank else True) as bar:
        for start in starts:
            count = min(batch, samples - start)
            with counted_calls(loaded.network) as calls:
                result = generate_tokens(loaded, batch=count, seed=seed, first_row=start, **options)
            if result.nfe != calls[0]:
                raise TrainingError(f"the sampler reports {result.nfe} network calls, the network counted {calls[0]}; report this defect")
            for row, (tokens, stop) in enumerate(zip(result.tokens, result.stops, strict=True), start):
                text = loaded.tokenizer.decode(tokens[1:].tolist())
                score = None if judge is None else judge.score(text)
                entropy = histogram_entropy(tokens[1:]) if len(tokens) > 1 else None
                judged = (None, None) if score is None else (score.nll, score.tokens)
                mine.append(Text(row, seed, text, tokens.tolist(), stop, calls[0], entropy, *judged))
            bar.update()
    gathered = layout.all_gather(mine if layout.reports_for_replica else [])
    return sorted((text for share in gathered for text in share), key=lambda text: text.row)


def summary(texts: Sequence[Text]) -> dict[str, Any]:
    """The numbers of a table: lengths in the model's tokens, NFE per text, entropy, and generative perplexity where judged."""
    lengths = np.array([text.length for text in texts])
    entropies = [text.entropy for text in texts if text.entropy is not None]
    judged = [(text.judge_nll, text.judge_tokens) for text in texts if text.judge_nll is not None and text.judge_tokens]
    document: dict[str, Any] = {
        "samples": len(texts),
        "empty": int((lengths == 0).sum()),
        "length_median": float(np.median(lengths)),
        "length_max": int(lengths.max()),
        "stops": {stop: sum(text.stop == stop for text in texts) for stop in sorted({text.stop for text in texts})},
        "nfe": float(np.mean([text.nfe for text in texts])),
        "entropy": float(np.mean(entropies)) if entropies else None,
        "generative_perplexity": None,
        "generative_perplexity_pooled": None,
    }
    if judged:
        nll, tokens = np.array(judged, np.float64).T
        each = np.exp(nll / tokens)
        document["generative_perplexity"] = float(each.mean())
        document["generative_perplexity_standard_error"] = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
        document["generative_perplexity_pooled"] = float(np.exp(nll.sum() / tokens.sum()))
        document["judge_tokens"] = int(tokens.sum())
    return document
