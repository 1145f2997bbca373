"""The data of a run: `open_data` gives what a recipe's `data` section asks for, or says in one line why not.

Invariant: an existing folder is taken as it is or refused. It is never rebuilt because a recipe asks for something else, and a recipe
that asks for something else than the folder holds never trains on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bd3_scale.data.config import DataConfig
from bd3_scale.data.documentation import documentation
from bd3_scale.data.manifest import MANIFEST, Manifest
from bd3_scale.data.prepare import Packing, prepare
from bd3_scale.data.shards import ShardReader, fetch_manifest
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.errors import DataError


@dataclass(frozen=True)
class Data:
    """A data folder that fits the recipe, ready to be read."""

    folder: Path
    tokenizer: Tokenizer
    manifest: Manifest
    train: ShardReader
    validation: ShardReader

    @property
    def fingerprint(self) -> str:
        """Equal for equal data; for comparing ranks, nodes and restarts."""
        return self.manifest.fingerprint

    def close(self) -> None:
        """Close the files of both readers."""
        self.train.close()
        self.validation.close()

    def __enter__(self) -> Data:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def open_data(config: DataConfig, context: int, *, leader: bool, barrier: Callable[[], object], progress: bool = True) -> Data:
    """The data that `config` describes, in rows of `context` tokens.

    Where the folder holds no manifest, the leader fetches it (`data.remote`) or prepares the folder (`data.source`), with a progress bar,
    while the others wait: every rank calls `barrier` exactly once, whatever happens. One leader per file system is needed; more do no harm.
    Raises DataError, on every rank.
    """
    folder = Path(config.path).expanduser().absolute()
    tokenizer: Tokenizer | None = None
    try:
        if leader:
            tokenizer = load_tokenizer(config.tokenizer)
            if config.remote is not None:
                fetch_manifest(config.remote, folder)
            elif not (folder / MANIFEST).exists() and config.source == "documentation":
                packing = Packing(tokenizer, context, config.row_special, config.format)
                source_tokens, text = config.source_tokens, tokenizer
                prepare(folder, packing, "documentation", source_tokens, lambda: documentation(text, source_tokens, progress=progress))
    finally:
        barrier()
    tokenizer = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer
    if not (folder / MANIFEST).exists():
        raise DataError(
            f"data.path={folder}: holds no {MANIFEST}; set data.source=documentation or prepare it: `python tools/prepare_data.py "
            f"--source FILE --path {folder} --context {context} --tokenizer {config.tokenizer} --format {config.format} "
            f"--row-special {config.row_special}`"
        )
    manifest = Manifest.load(folder / MANIFEST)
    manifest.require(folder, context=context, tokenizer=tokenizer)
    manifest.require_preparation(folder, format=config.format, row_special=config.row_special)
    if config.source is not None:
        manifest.require_preparation(folder, source=config.source, source_tokens=config.source_tokens)
    open_shards = min(max(2 * config.window + 2, 8), 256)  # two windows meet in a batch
    train, validation = (
        ShardReader(folder, split, context=context, tokenizer=tokenizer, remote=config.remote, manifest=manifest, open_shards=open_shards)
        for split in ("train", "validation")
    )
    return Data(folder, tokenizer, manifest, train, validation)
