"""The `data` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DataConfig:
    """Where rows of tokens come from. A data folder holds `manifest.json`, `train/` and `validation/`."""

    path: str = "~/.cache/bd3_scale/data"
    """Folder of prepared rows; with `remote` set, the local cache of it."""
    remote: str | None = None
    """A folder or URL (s3://, gs://, ...) that shards are fetched from when `path` lacks them."""
    format: str = "mds"
    """mds (mosaicml-streaming) | webdataset (tar)."""
    source: str | None = None
    """What to prepare `path` from when it holds no manifest: documentation (docstrings of the installed Python packages), or nothing."""
    source_tokens: int = 4_000_000
    """At most so many tokens are prepared from `source`."""
    tokenizer: str = "gpt2"
    """gpt2 | bytes | the path of a `tokenizers` JSON file."""
    row_special: str = "bos"
    """Special tokens of each row when it is packed: none | bos | bos_eos (the paper)."""
    window: int = 16
    """Shards that are shuffled together: larger mixes better, smaller streams better."""
    prefetch: int = 2
    """Global batches read ahead of need."""
