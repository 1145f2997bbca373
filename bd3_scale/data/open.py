"""The data of a run: `open_data` gives what a recipe's `data` section asks for, or says in one line why not.

Invariant: an existing folder is taken as it is or refused. It is never rebuilt because a recipe asks for something else, and a recipe
that asks for something else than the folder holds never trains on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bd3_scale.data.cache import Cache
from bd3_scale.data.checked_once import sweep, take_away
from bd3_scale.data.formats.row_reader import ShardReader
from bd3_scale.data.loader import Loader, MicroBatch, Order, Rows, TrainingRows
from bd3_scale.data.manifest import MANIFEST, Manifest
from bd3_scale.data.mixture import MixedHeldOut, MixedOrder, MixedRows, Mixture
from bd3_scale.data.order import GlobalOrder, SkippingOrder
from bd3_scale.data.preparation.documentation import documentation
from bd3_scale.data.preparation.prepare import Packing, prepare
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.errors import DataError
from bd3_scale.files import expanded
from bd3_scale.recipe.schema import DataConfig, SourceConfig
from bd3_scale.recipe.stages import batch_schedule


@dataclass(frozen=True)
class Source:
    """A data folder that fits the recipe, ready to be read."""

    folder: Path
    manifest: Manifest
    train: ShardReader
    validation: ShardReader


@dataclass(frozen=True)
class Data:
    """What a run trains and validates on: one folder, or a mixture of several."""

    config: DataConfig
    tokenizer: Tokenizer
    sources: tuple[Source, ...]
    mixture: Mixture | None
    """None where there is one folder."""
    train: TrainingRows
    """All training rows, each once."""
    validation: Rows
    """The held-out rows; for a mixture in its proportions (MixedHeldOut)."""

    @property
    def folder(self) -> str:
        """The folder or folders, for people."""
        return " + ".join(str(source.folder) for source in self.sources)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first folder: context, tokenizer, vocabulary and special tokens are those of all."""
        return self.sources[0].manifest

    @property
    def train_tokens(self) -> int:
        """Document tokens of the training splits."""
        return sum(source.manifest.train.tokens for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Equal for equal data in equal proportions; for comparing ranks, nodes and restarts."""
        if self.mixture is None:
            return self.manifest.fingerprint
        shares = [[source.manifest.fingerprint, share] for source, share in zip(self.sources, self.mixture.shares.tolist(), strict=True)]
        return hashlib.sha256(json.dumps(shares).encode()).hexdigest()

    def order(self, seed: int) -> Order:
        """The global order of the training rows, a function of (seed, data.window, data.skip, the data)."""
        orders = [GlobalOrder(source.train.shard_rows, seed, self.config.window) for source in self.sources]
        order: Order = orders[0]
        if self.mixture is not None:
            order = MixedOrder(self.mixture, orders, [len(source.train.shard_rows) for source in self.sources])
        return SkippingOrder(order, self.config.skip) if self.config.skip else order

    def loader(
        self,
        seed: int,
        *,
        global_batch: Any,
        micro_batch: int | None,
        draws: int = 1,
        replica: int,
        replicas: int,
        host: range | None = None,
        prepare: Callable[[int, list[MicroBatch], int], Any] | None = None,
    ) -> Loader:
        """What reads the global batches of a run; see `Loader`. Raises DataError where a bounded cache is too small for what is read at a
        time."""
        for source in self.sources:
            order = GlobalOrder(source.train.shard_rows, seed, self.config.window)
            source.train.require_room(order.shards_at_once(batch_schedule(global_batch, draws).largest * (self.config.prefetch + 1)))
        return Loader(
            self.train,
            self.order(seed),
            global_batch=global_batch,
            micro_batch=micro_batch,
            draws=draws,
            replica=replica,
            replicas=replicas,
            prefetch=self.config.prefetch,
            download_ahead=self.config.download_ahead,
            by_shard=self.config.group_by_shard,
            host=host,
            prepare=prepare,
        )

    def close(self) -> None:
        """Close the files of all readers; what was found of them goes, too."""
        for source in self.sources:
            source.train.close()
            source.validation.close()
        take_away()

    def __enter__(self) -> Data:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def open_data(config: DataConfig, context: int, *, leader: bool, barrier: Callable[[], object], progress: bool = True) -> Data:
    """The data that `config` describes, in rows of `context` tokens.

    Where a folder holds no manifest, the leader fetches it (`remote`) or prepares the folder (`data.source`), with a progress bar,
    while the others wait: every rank calls `barrier` exactly once, whatever happens. One leader per file system is needed; more do no harm.
    Raises DataError, on every rank.
    """
    wanted = config.mixture or [SourceConfig(path=config.path, remote=config.remote, format=config.format)]
    tokenizer: Tokenizer | None = None
    try:
        if leader:
            sweep()
            tokenizer = load_tokenizer(config.tokenizer)
            for one in wanted:
                _provide(one, config, context, tokenizer, progress)
    finally:
        barrier()
    tokenizer = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer
    sources = tuple(_open(one, config, context, tokenizer) for one in wanted)
    if not config.mixture:
        return Data(config, tokenizer, sources, None, sources[0].train, sources[0].validation)
    mixture = Mixture([one.weight for one in wanted])
    train = MixedRows([source.train for source in sources], [len(source.train.shard_rows) for source in sources])
    return Data(config, tokenizer, sources, mixture, train, MixedHeldOut(mixture, [source.validation for source in sources]))


def open_held_out(name: str, path: str, config: DataConfig, context: int, tokenizer: Tokenizer) -> ShardReader:
    """The held-out rows of another prepared folder, in either format, which is the set `name`. Raises DataError where they are not rows as
    those of `config`."""
    folder = expanded(path).absolute()
    try:
        manifest = Manifest.load(folder / MANIFEST)
        manifest.require(folder, context=context, tokenizer=tokenizer)
        manifest.require_preparation(folder, row_special=config.row_special)
    except DataError as error:  # its cure is that of the training data
        raise DataError(
            f"validation.sets.{name}={path}: {str(error).rpartition('; ')[0] or error}; set it to a folder that bd3 prepare made "
            "with the tokenizer, context and special tokens of the training data"
        ) from None
    return ShardReader(folder, "validation", context=context, tokenizer=tokenizer, manifest=manifest, open_shards=1)


def _folder(wanted: SourceConfig) -> Path:
    return expanded(wanted.path).absolute()


def _cache(wanted: SourceConfig, config: DataConfig) -> Cache | None:
    return None if wanted.remote is None else Cache(_folder(wanted), wanted.remote, config.cache_bytes)


def _provide(wanted: SourceConfig, config: DataConfig, context: int, tokenizer: Tokenizer, progress: bool) -> None:
    """See to it that the folder has its manifest, where that is in our hands."""
    cache = _cache(wanted, config)
    if cache is not None:
        cache.manifest()
    elif not (_folder(wanted) / MANIFEST).exists() and config.source == "documentation":
        packing = Packing(tokenizer, context, config.row_special, wanted.format)
        tokens = config.source_tokens
        prepare(_folder(wanted), packing, "documentation", tokens, lambda: documentation(tokenizer, tokens, progress=progress))


def _open(wanted: SourceConfig, config: DataConfig, context: int, tokenizer: Tokenizer) -> Source:
    folder, cache = _folder(wanted), _cache(wanted, config)
    if not (folder / MANIFEST).exists():
        raise DataError(
            f"data.path={folder}: holds no {MANIFEST}; set data.source=documentation or prepare it: `bd3 prepare "
            f"--source FILE --path {folder} --context {context} --tokenizer {config.tokenizer} --format {wanted.format} "
            f"--row-special {config.row_special}`"
        )
    manifest = Manifest.load(folder / MANIFEST)
    manifest.require(folder, context=context, tokenizer=tokenizer)
    manifest.require_preparation(folder, format=wanted.format, row_special=config.row_special)
    if config.source is not None:
        manifest.require_preparation(folder, source=config.source, source_tokens=config.source_tokens)

    def reader(split: str, open_shards: int) -> ShardReader:
        return ShardReader(folder, split, context=context, tokenizer=tokenizer, cache=cache, manifest=manifest, open_shards=open_shards)

    # Two windows meet in a batch, one is opened ahead. Held-out rows are read shard by shard: what is open cannot leave a bounded cache.
    return Source(folder, manifest, reader("train", min(max(3 * config.window + 2, 8), 256)), reader("validation", 1))
