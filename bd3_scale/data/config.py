"""The `data` section of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any


@dataclass
class SourceConfig:
    """One data set of a mixture: path, remote and format as in `data`."""

    path: str = ""
    weight: float = 1.0
    """Its share of the samples, with at most four decimals; the weights of a mixture sum up to 1."""
    remote: str | None = None
    format: str = "mds"


@dataclass
class DataConfig:
    """Where rows of tokens come from. A data folder holds `manifest.json`, `train/` and `validation/`."""

    path: str = "~/.cache/bd3_scale/data"
    """Folder of prepared rows; with `remote` set, the local cache of it."""
    remote: str | None = None
    """A folder or URL (s3://, gs://, ...) that shards are fetched from when `path` lacks them."""
    format: str = "mds"
    """mds (mosaicml-streaming) | webdataset (tar)."""
    mixture: list[SourceConfig] = field(default_factory=list)
    """Several data sets instead of `path`: [{path: A, weight: 0.7}, {path: B, weight: 0.3, remote: ..., format: ...}]. Each is read in
    its own order, epoch by epoch; validation takes held-out rows of all in the same proportions."""
    cache_bytes: int | None = None
    """The most that each local folder of a remote may hold: shards not needed soon are deleted from it. null: everything stays."""
    download_ahead: int = 16
    """Shards fetched from a remote, and opened and checked, ahead of need, after those of the current window."""
    source: str | None = None
    """What to prepare `path` from when it holds no manifest: documentation (docstrings of the installed Python packages), or nothing."""
    source_tokens: int = 4_000_000
    """At most so many tokens are prepared from `source`."""
    tokenizer: str = "gpt2"
    """gpt2 | bytes | the path of a `tokenizers` JSON file."""
    row_special: str = "bos"
    """Special tokens of each row when it is packed: none | bos | bos_eos. The paper packs OpenWebText with none, so that texts go on past
    a row, and LM1B with bos_eos, where a row, and so every text of the model, ends with an end of text."""
    window: int = 16
    """Shards that are shuffled together: larger mixes better, smaller streams better."""
    document_mask: bool = False
    """Documents that are packed into one row do not see each other; in a block where one ends, from the next block on."""
    skip: list[Any] = field(default_factory=list)
    """Ranges of samples, [[from, to], ...], that are left out: sample n is row n % training.global_batch of step n // training.global_batch
    of the run without a skip (with a schedule of batches, the n-th row of its steps), `to` is not left out."""
    prefetch: int = 2
    """Global batches read, noised and laid out ahead of need; 0: when they are needed, by the main thread."""


DIGITS = 4
"""Decimals that a weight may have: the period is at most 10^DIGITS samples."""


def weights_problem(weights: Sequence[float]) -> str | None:
    """What is wrong with the weights of a mixture and how to mend it; None: nothing."""
    if not all(0 < weight < float("inf") for weight in weights):
        return f"weights {list(weights)} must all be above 0; leave out what is not to be read"
    if sum(map(exact_weight, weights)) != 1 or not all(map(exact_weight, weights)):
        shares = [max(1, round(10**DIGITS * weight / sum(weights))) for weight in weights]
        shares[shares.index(max(shares))] += 10**DIGITS - sum(shares)
        nearest = ", ".join(str(share / 10**DIGITS) for share in shares)
        return f"weights {list(weights)} must sum up to 1, with at most {DIGITS} decimals each; set them to {nearest}"
    return None


def exact_weight(weight: float) -> Fraction:
    """The decimal that was written, or 0 where it has more than DIGITS decimals."""
    exact = Fraction(repr(float(weight)))
    return exact if (exact * 10**DIGITS).denominator == 1 else Fraction(0)
