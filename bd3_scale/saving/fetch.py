"""Fetches the latest checkpoint of a remote folder: every rank its share of the bytes, so that a new cluster continues.

The ranks fetch in rounds of seconds and meet after each, so that no collective waits for a whole file. What a killed or broken fetch
left is taken up where it ended. Invariants: a checkpoint gets its name, and `latest` names it, only when every file is what its index
says, to the bit; a name from the remote folder never leaves the local one: `latest` must be a checkpoint's name, and only files that
the index names (plain names, with their hashes) are fetched; of a remote checkpoint that is damaged nothing stays.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from bd3_scale.checkpoint.index import INDEX_NAME, FileRecord, parse
from bd3_scale.checkpoint.reader import LARGEST_INDEX, STEP_NAME, Checkpoint, shares_of_files
from bd3_scale.checkpoint.shard_files import check_content, write_text
from bd3_scale.checkpoint.store import LATEST_NAME, sweep, take_in
from bd3_scale.collective_errors import Communicator, Solo, together
from bd3_scale.errors import CheckpointError
from bd3_scale.files import sync_directory

BLOCK = 1 << 24
"""Bytes that are asked for at once."""
ROUND = 20.0
"""Seconds after which the ranks meet."""
ATTEMPTS = 5
PAUSE = 3.0
"""Seconds before a rank tries again what has failed."""


def fetch_latest(
    url: str, folder: Path, communicator: Communicator | None = None, beat: Callable[[int, int], None] = lambda done, total: None
) -> Path | None:
    """Fetch the checkpoint that `url`/latest names into `folder`, which all ranks share; None where nothing was ever uploaded. Collective.

    `beat`: called after every round with the bytes that are there and those of all. Raises CheckpointError on all ranks where it is not
    whole, or cannot be read.
    """
    communicator = communicator or Solo()

    def explain(error: BaseException) -> str:
        return f"{type(error).__name__}: {error}"

    def look() -> tuple[str, bytes] | None:
        return _named(url, folder) if communicator.rank == 0 else None

    temporary: Path | None = None
    try:
        named = together(communicator, look, explain)[0]
        if named is None:
            return None
        name, text = named
        temporary = _place(folder, name, text)
        _fetch_all(url, temporary, parse(text).files, communicator, explain, beat)

        def finish() -> None:
            if communicator.rank == 0:
                if not (temporary / INDEX_NAME).exists():
                    write_text(temporary / INDEX_NAME, text)
                sync_directory(temporary)
                Checkpoint(temporary, offer=False)
                take_in(temporary, folder / name)

        together(communicator, finish, explain)
        return folder / name
    except CheckpointError as error:
        if not isinstance(error.__cause__, OSError) and temporary is not None and communicator.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # damaged there: nothing to go on with
        raise CheckpointError(
            f"the checkpoint at {url} cannot be continued from: {error}; fix that, or set checkpoint.remote=null to begin without it"
        ) from error


def _place(folder: Path, name: str, text: bytes) -> Path:
    """Where what is fetched is put together: the same for the same checkpoint; the next save would sweep it away."""
    return folder / f"{name}.tmp-{hashlib.sha256(text).hexdigest()[:8]}"


def _named(url: str, folder: Path) -> tuple[str, bytes] | None:
    """The name that `url`/latest holds and the index of that checkpoint; the place for it is made, and what is left of others goes."""
    filesystem, root = fsspec.core.url_to_fs(url)
    root = root.rstrip("/")
    if not filesystem.exists(f"{root}/{LATEST_NAME}"):
        return None
    name = filesystem.cat_file(f"{root}/{LATEST_NAME}", start=0, end=1000).decode("ascii", "replace").strip()
    if STEP_NAME.fullmatch(name) is None:
        raise CheckpointError(f"{url}/{LATEST_NAME} holds {name[:80]!r}, which is no checkpoint's name; write one into it")
    text: bytes = filesystem.cat_file(f"{root}/{name}/{INDEX_NAME}", start=0, end=LARGEST_INDEX)
    parse(text)
    place = _place(folder, name, text)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, spare=place)
    place.mkdir(exist_ok=True)
    return name, text


def _fetch_all(
    url: str,
    temporary: Path,
    files: dict[str, FileRecord],
    communicator: Communicator,
    explain: Callable[[BaseException], str],
    beat: Callable[[int, int], None],
) -> None:
    filesystem, root = fsspec.core.url_to_fs(f"{url.rstrip('/')}/{temporary.name.partition('.')[0]}")
    left = shares_of_files(files, communicator.world_size)[communicator.rank]
    total = sum(record.bytes for record in files.values())
    blocks: Iterator[int] = iter(())
    name, done, here, failures, fresh = "", 0, 0, 0, True

    def fetch_some() -> tuple[int, bool, str]:
        """Fetch for some seconds; the bytes that are there, whether all of this rank's are, and what ends the attempt."""
        nonlocal blocks, name, done, here, failures, fresh
        if not temporary.is_dir():
            raise CheckpointError(f"rank {communicator.rank} does not find {temporary}; set run.dir to a file system that all nodes share")
        end = time.monotonic() + ROUND
        while time.monotonic() < end:
            try:
                here += next(blocks)
                failures, fresh = failures if fresh else 0, False  # the first are bytes that were here
            except StopIteration:
                done, here = done + here, 0
                if not left:
                    return done, True, ""
                name, fresh = left.pop(), True
                blocks = _fetched(filesystem, f"{root.rstrip('/')}/{name}", temporary / name, files[name])
            except CheckpointError:
                raise
            except FileNotFoundError:
                raise CheckpointError(f"{name} is missing") from None
            except Exception as error:  # each of fsspec's file systems raises classes of its own
                left.append(name)
                blocks, here, failures = iter(()), 0, failures + 1
                if failures >= ATTEMPTS:
                    return done, False, f"{name} could not be fetched ({ATTEMPTS} attempts; {type(error).__name__}: {error})"
                time.sleep(PAUSE)
        return done + here, False, ""

    while True:
        answers = together(communicator, fetch_some, explain)
        beat(sum(there for there, _, _ in answers), total)
        broken = [text for _, _, text in answers if text]
        if broken:
            raise CheckpointError(f"{broken[0]}; what is here is kept for the next start") from OSError(broken[0])
        if all(whole for _, whole, _ in answers):
            return


def _fetched(filesystem: Any, source: str, target: Path, record: FileRecord) -> Iterator[int]:
    """Fetch one file from where an earlier attempt ended; gives the bytes of each block. It has its name when its hash is right."""
    if target.exists():
        check_content(target, record)
        yield record.bytes
        return
    part = target.with_name(f"{target.name}.part")
    with open(part, "ab") as file:
        begun = file.tell()
        yield begun
        while begun < record.bytes:
            block = filesystem.cat_file(source, start=begun, end=min(begun + BLOCK, record.bytes))
            if not block:
                raise CheckpointError(f"{target.name} has {begun} bytes there instead of {record.bytes}")
            file.write(block)
            begun += len(block)
            yield len(block)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, target)
    try:
        check_content(target, record)
    except CheckpointError:
        target.unlink()
        raise
