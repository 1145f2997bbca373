"""Saves while training goes on: the step waits for a copy to host memory, a thread on every rank does the rest.

The thread runs `store.save` itself, so there is one implementation of writing and publishing. Its ranks talk over a gloo group of
their own: the training's groups would see collectives of two threads in an order that differs from rank to rank. Only these
threads use the group, one save at a time, so its order is that of the saves. (Files in the temporary folder would do as well, but
would need time-outs and a second form of `together`; with a group every rank hears the same error, and a lost rank is an error.)

Invariants: what is written is the state at the call of `save`, whatever training does meanwhile; the main threads learn of an
outcome only in `wait`, which all ranks call after the same step and which says the same on all of them; errors of the file
system are tolerated `patience` times in a row, all others never.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bd3_scale.checkpoint import store
from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.index import normalise_run
from bd3_scale.collective_errors import Communicator, Solo
from bd3_scale.errors import CheckpointError
from bd3_scale.recipe.schema import CheckpointConfig
from bd3_scale.saving.remote import Uploader, check_url

LONGEST_SAVE = datetime.timedelta(hours=2)
"""A rank whose thread is this much later than the others' hangs in its file system."""


class Channel:
    """A communicator of its own for the background threads. Made by the main threads, all at the same place."""

    def __init__(self, communicator: Communicator) -> None:
        self.rank, self.world_size = communicator.rank, communicator.world_size
        self._group = dist.new_group(backend="gloo", timeout=LONGEST_SAVE)

    def all_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        self.all_gather(None)

    def close(self) -> None:
        dist.destroy_process_group(self._group)


PIECE = 1 << 28
"""Numbers that are allocated together: torch rounds what is pinned up to a power of two, of the whole that might be as much again."""


def _host_memory(sizes: Sequence[int], *, pinned: bool) -> list[torch.Tensor]:
    """fp32 [size] for each, in pieces of about `PIECE`."""
    groups: list[list[int]] = [[]]
    for size in sizes:
        if groups[-1] and sum(groups[-1]) + size > PIECE:
            groups.append([])
        groups[-1].append(size)
    pieces = (torch.empty(sum(group), dtype=torch.float32, pin_memory=pinned).split(group) for group in groups)
    return [value for piece in pieces for value in piece]


class HostCopy:
    """Host memory for this rank's fragments, kept from save to save; pinned where the state is on CUDA."""

    def __init__(self) -> None:
        self._room: list[torch.Tensor] = []
        self._event: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """The fragments with values of their own. On CUDA they are there after `ready`; the stream orders later updates behind."""
        sizes = [fragment.region.numel for fragment in fragments]
        cuda = any(fragment.value.is_cuda for fragment in fragments)
        if [len(value) for value in self._room] != sizes or any(cuda and not value.is_pinned() for value in self._room[:1]):
            self._room = []  # the old one goes before the new one comes
            self._room = _host_memory(sizes, pinned=cuda)
        copies = []
        for fragment, value in zip(fragments, self._room, strict=True):
            value.copy_(fragment.value, non_blocking=cuda)
            copies.append(Fragment(fragment.kind, fragment.name, fragment.region, value))
        self._event = None
        if torch.cuda.is_initialized():  # also where this rank owns nothing: a sum of its weights is on its way
            self._event = torch.cuda.Event()
            self._event.record()
        return copies

    def ready(self) -> None:
        """Wait for the copies."""
        if self._event is not None:
            self._event.synchronize()


@dataclass
class Outcome:
    """What became of a save, the same on all ranks but for the text of a defect."""

    step: int
    path: Path | None = None
    failure: Exception | None = None
    tolerable: bool = False
    """The failure is one of the file system, on every rank that failed."""
    warned: bool = False


class Saver:
    """Owned by a run, on every rank. `say` and `warn(step, text)` are called in the main thread only.

    Every method but `poll` is called by all ranks after the same steps.
    """

    def __init__(
        self,
        folder: str | Path,
        config: CheckpointConfig,
        communicator: Communicator | None = None,
        *,
        say: Callable[[str], None] = lambda text: None,
        warn: Callable[[int, str], None] = lambda step, text: None,
        may_write: Callable[[], None] = lambda: None,
        continued: tuple[int, Path] | None = None,
        channel: Communicator | None = None,
    ) -> None:
        """`may_write`: see `store.save`. `continued`: step and place of the checkpoint that the run goes on from. `channel`: what the
        background threads talk over, for tests; else a gloo group where there are several ranks."""
        self.folder, self.config = Path(folder), config
        self.communicator = communicator or Solo()
        self.step: int | None = None if continued is None else continued[0]
        """The step of the last save that was begun."""
        self.published: Path | None = None if continued is None else continued[1]
        """The newest checkpoint that this run has finished, as of the last `wait`."""
        self.failures = 0
        """Failed saves in a row, as of the last `wait`."""
        self._say, self._warn, self._may_write = say, warn, may_write
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._notes: list[str] = []
        """Lines of the threads that the main thread has still to warn of (appending is atomic)."""
        if config.remote is not None:
            check_url(config.remote)
        self._own = Channel(self.communicator) if channel is None and config.asynchronous and self.communicator.world_size > 1 else None
        self._channel = channel or self._own or self.communicator
        self._uploader: Uploader | None = None
        if config.remote is not None:
            leads, keep = self.communicator.rank == 0, (config.remote_keep, config.keep_every)
            self._uploader = Uploader(config.remote, self._notes.append, leads=leads, keep=keep[0], keep_every=keep[1])

    def save(
        self,
        step: int,
        fragments: Sequence[Fragment],
        *,
        samples_consumed: int,
        run: Mapping[str, Any],
        recipe: str,
        replica: tuple[Any, torch.Tensor] | None = None,
    ) -> float:
        """Begin to save the state after `step` (see `store.save`; the sum of `replica` is on the device); returns the seconds that
        training waited.

        Waits first for a save that is still being written. Raises CheckpointError where that one ended the patience, or at
        once, on any rank, for entries of `run` that are not JSON.
        """
        start = time.perf_counter()
        run = normalise_run(run)  # a copy: the thread must not see what training does to it
        if self._thread is not None and self._thread.is_alive():
            before, began = self.step, time.perf_counter()
            self._thread.join()
            self._say(f"step {step}: waited {time.perf_counter() - began:.1f} s for the checkpoint of step {before} to be written")
        self.wait()
        self.step = step
        details = {"samples_consumed": samples_consumed, "run": run, "recipe": recipe, "replica": replica}
        if self.config.asynchronous:
            if replica is not None:
                total = torch.empty((), dtype=torch.int64, pin_memory=replica[1].is_cuda)
                details["replica"] = replica[0], total.copy_(replica[1], non_blocking=True)  # there when the copies are
            copies = self._host.take(fragments)
            self._thread = threading.Thread(target=self._write, args=(step, copies, details), name=f"checkpoint {step}", daemon=True)
            self._thread.start()
        else:
            self._write(step, fragments, details)
            self.wait()
        return time.perf_counter() - start

    def poll(self) -> None:
        """Warn of what has gone wrong so far without waiting for anything; changes nothing that ranks must agree on."""
        while self._notes:
            self._warn(self.step or 0, self._notes.pop(0))
        outcome = self._outcome
        if outcome is not None and outcome.failure is not None and not outcome.warned:
            outcome.warned = True
            self._warn(outcome.step, f"SAVING FAILED at step {outcome.step}: {outcome.failure}")

    def wait(self, last: bool = False) -> None:
        """Wait for the save under way and take its outcome. Raises its failure where it cannot be tolerated: all that are no
        errors of the file system, those that come after the patience is spent, and any of the `last` save of a run."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()
        outcome, self._outcome = self._outcome, None
        if outcome is None:
            return
        if outcome.failure is None:
            self.failures, self.published = 0, outcome.path
            return
        self.failures += 1
        if last or not outcome.tolerable:
            raise outcome.failure
        if self.failures > self.config.patience:
            raise CheckpointError(
                f"{outcome.failure}; that is failed save {self.failures} in a row, and checkpoint.patience is {self.config.patience}"
            ) from outcome.failure
        left = self.config.patience - self.failures
        self._say(
            f"bd3_scale: training goes on without a checkpoint of step {outcome.step}; {left} more failed saves in a row are tolerated"
        )

    def close(self, upload_seconds: float = 0.0) -> None:
        """The end of a run: wait for the last save, which must succeed, and up to `upload_seconds` for its upload."""
        try:
            self.wait(last=True)
        finally:
            if self._uploader is not None:
                self._uploader.close(upload_seconds)
                self.poll()
        if self._own is not None:
            self._own.close()
            self._own = None

    def _write(self, step: int, fragments: Sequence[Fragment], details: dict[str, Any]) -> None:
        """All of a save but the copy. Never raises: the outcome is left for `wait`."""
        outcome, mine = Outcome(step), list[str]()
        channel = self._channel
        try:
            self._host.ready()
            try:
                if (replica := details.pop("replica")) is not None:
                    details["replica"] = replica[0], int(replica[1])
                outcome.path = store.save(
                    self.folder, step, fragments, communicator=channel, may_write=self._may_write, wrote=mine.append, **details
                )
            except CheckpointError as error:
                outcome.failure = error
                # Only the ranks that failed have a cause, and all must judge alike.
                causes = [
                    cause for cause in channel.all_gather(None if error.__cause__ is None else _is_storage(error)) if cause is not None
                ]
                outcome.tolerable = bool(causes) and all(causes)
            if outcome.path is not None:
                if self._uploader is not None and (mine or channel.rank == 0):
                    self._uploader.offer(outcome.path, mine)
                if channel.rank == 0:
                    self._published()
        except Exception as error:  # a defect or a lost rank: raised again by the main thread
            outcome.failure, outcome.tolerable = error, False
        self._outcome = outcome

    def _published(self) -> None:
        """On the leader: delete what is too old."""
        busy = self._uploader.busy if self._uploader is not None else set()
        try:
            store.retain(self.folder, self.config.keep, keep_every=self.config.keep_every, spare=busy)
        except CheckpointError as error:
            self._notes.append(str(error))  # the new checkpoint stands all the same


def _is_storage(error: BaseException) -> bool:
    """Whether an error of the file system (a full disk, a lost permission) is behind it."""
    cause = error.__cause__
    while cause is not None:
        if isinstance(cause, OSError):
            return True
        cause = cause.__cause__
    return False
