"""Checkpoint folders: saved atomically by all ranks together, found, and deleted in time.

    checkpoints/
      step_00000100/   index.json  recipe.yaml  state-00000-of-00004.safetensors ...
      latest           the name of the folder to continue from
    while saving:  step_00000200.tmp-1f2e3d4c/   (left behind by a crash: swept by the next save)
    while a step is saved again:  step_00000200.old-1f2e3d4c/   (its predecessor, deleted last)

Invariants: a folder called step_X is complete, because it gets that name by one rename after every file in it was synced;
`latest` moves last; a crash at any moment, or an error on any rank, leaves what `latest` named whole and readable (by
`find_latest` under its .old name if the crash fell between the two renames of a step saved again). Each rank writes one file
with what it owns, so no rank ever holds the whole state. No pickle, no time, no host name: the same state saved by the same
layout gives the same bytes.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import re
import secrets
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import bd3_scale
from bd3_scale.checkpoint import index_process
from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.index import INDEX_NAME, RECIPE_NAME, FileRecord, normalise_run
from bd3_scale.checkpoint.parts import pack, state_name
from bd3_scale.checkpoint.reader import STEP_NAME, Checkpoint, newest_whole, step_folders, step_name
from bd3_scale.checkpoint.shard_files import check_size, read_text, write_shard, write_text
from bd3_scale.collective_errors import Communicator, Solo, together
from bd3_scale.errors import CheckpointError, UserError
from bd3_scale.files import sync_directory

__all__ = ["Checkpoint", "Communicator", "Solo", "find_latest", "locate", "retain", "save", "step_name"]

LATEST_NAME = "latest"
LEFT_OVER = re.compile(r"(?P<name>step_\d{8,}|latest)\.(?P<state>tmp|old|trash)-[0-9a-f]{8}")
PACKAGES = ("torch", "numpy", "safetensors", "megatron-core", "deepspeed")
CURES = {
    errno.ENOSPC: "free space there or set another run.dir",
    errno.EDQUOT: "free quota there or set another run.dir",
    errno.EACCES: "make the folder writable or set another run.dir",
    errno.EPERM: "make the folder writable or set another run.dir",
    errno.EROFS: "make the folder writable or set another run.dir",
}
"""What a person can do about an error of the file system."""


def save(
    folder: str | Path,
    step: int,
    fragments: Sequence[Fragment],
    *,
    samples_consumed: int,
    run: Mapping[str, Any],
    recipe: str,
    communicator: Communicator | None = None,
    may_write: Callable[[], None] = lambda: None,
    replica: tuple[Any, int] | None = None,
    wrote: Callable[[str], None] = lambda name: None,
) -> Path:
    """Save what this rank owns of the state after `step`; collective. Returns the new checkpoint folder in `folder`.

    The fragments of all ranks together must hold every element of every tensor exactly once (replicas use `slices.share`).
    `run` is free-form JSON, `recipe` the resolved recipe as YAML text; both count as the leader (rank 0) gives them.
    `may_write` raises where the folder is another job's by now; the leader asks before it deletes or renames anything.
    `replica`: (what this rank's weights are a copy of, the sum of their bits); equal copies must have equal sums. `wrote`: told the name of
    this rank's file.
    An existing checkpoint of the same step is replaced, atomically. On any failure on any rank every rank raises the same
    CheckpointError, nothing half-written remains, and the previous checkpoint and `latest` are as they were.
    """
    communicator = communicator or Solo()
    folder = Path(folder)
    step, samples_consumed = int(step), int(samples_consumed)
    target = folder / step_name(step)
    leader = communicator.rank == 0
    # Empty fragments (a rank that ZeRO gave nothing of a tensor) are nothing to write.
    owned = sorted((fragment for fragment in fragments if fragment.region.numel), key=lambda fragment: fragment.order)

    def explain(error: BaseException) -> str:
        return _explain(error, communicator)

    def prepare() -> tuple[Path | None, bool, tuple[Any, int, str] | None]:
        copied = None if replica is None else (*replica, socket.gethostname())
        if leader:
            normalise_run(run)
            may_write()
            return _make_temporary(folder, step), bool(owned), copied
        return None, bool(owned), copied

    def write() -> tuple[FileRecord, tuple[bytes, bytes]] | None:
        assert temporary is not None, "the leader has named the folder"
        if not owned:
            return None
        file = state_name(writers.index(communicator.rank), len(writers))
        wrote(file)
        return write_shard(temporary / file, owned), pack(owned)

    def publish() -> None:
        if leader:
            assert temporary is not None, "the leader has named the folder"
            wrote = [one for one in written if one is not None]
            files = {state_name(writer, len(writers)): record for writer, (record, _) in enumerate(wrote)}
            _finish(temporary, files, dict(enumerate(packed for _, packed in wrote)), step, samples_consumed, run, recipe)
            may_write()
            take_in(temporary, target)

    temporary = None
    try:
        answers = together(communicator, prepare, explain)
        temporary = answers[0][0]
        writers = [rank for rank, (_, writes, _) in enumerate(answers) if writes]
        require_equal_copies([copied for _, _, copied in answers])
        written = together(communicator, write, explain)
        together(communicator, publish, explain)
    except CheckpointError as error:
        if temporary is not None:
            # Every rank tidies, since without a shared file system each has its own. A failure to tidy would hide the cause.
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"checkpoint {target} could not be saved: {error} (the previous checkpoint stands)") from error.__cause__
    return target


def require_equal_copies(ranks: Sequence[tuple[Any, int, str] | None]) -> None:
    """Raise CheckpointError where ranks (what its weights are a copy of, the sum of their bits, host) differ from most of their like."""
    groups: dict[Any, list[int]] = {}
    for rank, known in enumerate(ranks):
        if known is not None:
            groups.setdefault(known[0], []).append(rank)
    odd: list[int] = []
    for members in groups.values():
        sums = Counter(ranks[rank][1] for rank in members)  # type: ignore[index]
        (usual, times), *others = sums.most_common()
        sole = not others or times > others[0][1]  # of two that differ nobody knows which is right
        odd += [rank for rank in members if ranks[rank][1] != usual or not sole]  # type: ignore[index]
    if odd:
        named = ", ".join(f"rank {rank} (host {ranks[rank][2]})" for rank in sorted(odd)[:8])  # type: ignore[index]
        raise CheckpointError(
            f"the weights of {named}{', ...' if odd[8:] else ''} differ from those of the other replicas, but must be the same to the bit: "
            "memory, a device or a network there corrupts data in silence; leave that host out and continue from the last checkpoint "
            "(checkpoint.compare_replicas=false saves without looking)"
        )


def take_in(temporary: Path, target: Path) -> None:
    """Give a checkpoint from elsewhere, whole and verified in a temporary folder, its name, and let `latest` name it. On one rank."""
    replaced = _move_in(temporary, target)
    try:
        _point_latest(target.parent, target.name)
    finally:
        if replaced is not None:
            shutil.rmtree(replaced)


def _make_temporary(folder: Path, step: int) -> Path:
    """Sweep what crashes left, and make the folder that a save writes into."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_directory(folder.parent)
    sweep(folder)
    temporary = folder / f"{step_name(step)}.tmp-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def sweep(folder: Path, spare: Path | None = None) -> None:
    """Delete what interrupted saves and deletions left in `folder`; put a checkpoint back that was on its way to be replaced."""
    for path in sorted(folder.iterdir()):
        match = LEFT_OVER.fullmatch(path.name)
        if match is None or path == spare:
            continue
        if match["state"] == "old" and not (folder / match["name"]).exists():
            os.replace(path, folder / match["name"])
            sync_directory(folder)
        else:
            _delete(path)


def _finish(
    temporary: Path,
    files: dict[str, FileRecord],
    packed: Mapping[int, tuple[bytes, bytes]],
    step: int,
    samples_consumed: int,
    run: Mapping[str, Any],
    recipe: str,
) -> None:
    """Write recipe and, last, the index beside the ranks' files; all on the disk when this returns."""
    for name, record in files.items():
        try:
            check_size(temporary / name, record)
        except CheckpointError as error:
            raise CheckpointError(
                f"rank 0 does not find what another rank wrote ({error}); set run.dir to a file system that all nodes share"
            ) from None
    files = {**files, RECIPE_NAME: write_text(temporary / RECIPE_NAME, recipe.encode("utf-8"))}
    text = index_process.make(step, samples_consumed, normalise_run(run), _versions(), files, packed)
    write_text(temporary / INDEX_NAME, text)
    sync_directory(temporary)


def _move_in(temporary: Path, target: Path) -> Path | None:
    """Give a finished folder its name. One of that name is moved aside first (returned) and put back where the move fails."""
    aside = target.with_name(f"{target.name}.old-{secrets.token_hex(4)}") if target.exists() else None
    if aside is not None:
        os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except BaseException:
        if aside is not None:
            os.replace(aside, target)
        raise
    sync_directory(target.parent)
    return aside


def _point_latest(folder: Path, name: str) -> None:
    """Make `latest` name a checkpoint; it holds the old name or the new one at any moment."""
    temporary = folder / f"{LATEST_NAME}.tmp-{secrets.token_hex(4)}"
    try:
        write_text(temporary, f"{name}\n".encode())
        os.replace(temporary, folder / LATEST_NAME)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(folder)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@functools.cache
def _versions() -> dict[str, str]:
    found = {"bd3_scale": bd3_scale.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _explain(error: BaseException, communicator: Communicator) -> str:
    """The line for an error of the file system, or for a defect."""
    where = f"rank {communicator.rank}: " if communicator.world_size > 1 else ""
    if isinstance(error, FileNotFoundError) and communicator.rank > 0:
        return f"{where}the folder that rank 0 made is not there; set run.dir to a file system that all nodes share"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{where}{error.strerror or error}; {CURES.get(error.errno or 0, 'fix that or set another run.dir')}"
    return f"{where}{type(error).__name__}: {error}"


def locate(path: str | Path) -> Path:
    """The checkpoint folder that a person means: itself, or the latest of a `checkpoints` folder or of a run directory.

    Raises CheckpointError where there is none; does not open one that is named directly.
    """
    path = Path(path)
    if (path / INDEX_NAME).exists() or STEP_NAME.fullmatch(path.name):
        return path
    for folder in (path / "checkpoints", path):
        found = find_latest(folder) if folder.is_dir() else None
        if found is not None:
            return found
    raise CheckpointError(
        f"{path} is neither a checkpoint nor a run directory that holds one; name a folder such as checkpoints/step_00001000"
    )


def retain(folder: str | Path, keep: int, *, keep_every: int = 0, spare: Collection[Path] = ()) -> list[Path]:
    """Delete all but the newest `keep` whole checkpoints up to the one that `latest` names; 0 keeps all. Call on one rank.

    Never deleted: the one that `latest` names, those of later steps (a run that was set back will replace them itself), those of
    steps that are multiples of `keep_every` (0: none), and `spare`.
    Without a readable `latest` nothing is deleted. Returns what was deleted. Raises CheckpointError where deleting fails.
    """
    folder = Path(folder)
    latest = _read_latest(folder)
    if keep <= 0 or latest is None:
        return []
    newest = int(latest.removeprefix("step_"))
    kept, deleted = 0, []
    for path in step_folders(folder):
        if int(path.name.removeprefix("step_")) > newest:
            continue
        if kept < keep:  # true of the first, which is the one that `latest` names
            kept += _is_whole(path)
            continue
        if path in spare or (keep_every > 0 and int(path.name.removeprefix("step_")) % keep_every == 0):
            continue
        try:
            # Renamed first: a folder that is half deleted must not bear the name of a checkpoint.
            trash = path.with_name(f"{path.name}.trash-{secrets.token_hex(4)}")
            os.replace(path, trash)
            shutil.rmtree(trash)
        except OSError as error:
            raise CheckpointError(f"old checkpoint {path} could not be deleted: {error.strerror or error}; delete it by hand") from error
        deleted.append(path)
    return deleted


def find_latest(folder: str | Path) -> Path | None:
    """The checkpoint to continue from: the one that `latest` names; None where nothing was ever saved. Changes nothing.

    Without `latest`: the newest whole one. Raises CheckpointError where `latest` names one that is damaged or missing, or no
    whole one is left; it says what is wrong and names the newest older whole checkpoint.
    """
    folder = Path(folder)
    name = _read_latest(folder)
    if name is not None:
        path = folder / name
        if not path.exists():
            # A crash while this very step was saved again: its predecessor is whole under another name.
            for aside in sorted(folder.glob(f"{name}.old-*")):
                if LEFT_OVER.fullmatch(aside.name) and _is_whole(aside):
                    return aside
        Checkpoint(path)
        return path
    whole = newest_whole(folder)
    if whole is None:
        for path in step_folders(folder):
            Checkpoint(path)  # raises: says what is wrong with the newest
    return whole


def step_of_latest(folder: Path) -> int | None:
    """The step that `latest` names, whether that checkpoint is whole or not; None where it cannot be read."""
    try:
        name = _read_latest(folder)
    except CheckpointError:
        return None
    return None if name is None else int(name.removeprefix("step_"))


def _is_whole(path: Path) -> bool:
    try:
        Checkpoint(path, offer=False)
    except CheckpointError:
        return False
    return True


def _read_latest(folder: Path) -> str | None:
    """The folder name in `latest`, or None without that file. Raises CheckpointError where it holds anything else."""
    path = folder / LATEST_NAME
    if not os.path.exists(path):
        return None
    try:
        text = read_text(path, 1000)
    except CheckpointError as error:
        raise CheckpointError(f"in {folder}, {error}; make it a text file that holds a checkpoint's name") from None
    name = text.decode("ascii", errors="replace").strip()
    if STEP_NAME.fullmatch(name) is None:
        whole = newest_whole(folder)
        cure = f"the newest whole checkpoint is {whole.name}: write that name into it" if whole else "no whole checkpoint stands beside it"
        raise CheckpointError(f"{path} holds {name[:80]!r}, which is no checkpoint's name; {cure}")
    return name
