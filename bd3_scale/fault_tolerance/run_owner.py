"""One job at a time owns a run directory: a second one is refused while the first lives, and takes over when it does not.

    owner/
      current      who owns it, JSON: made by an exclusive link (see `_claim`), replaced by one rename
      TOKEN        the same of every job that has not left in order; its time is the heartbeat, touched by a thread of the leader
      TOKEN.next   an exclusive link: whoever makes it succeeds TOKEN

A requeued job whose old ranks hang, or a second submission, would write the same metrics twice and delete what the other is saving. So
`check` is called before every line of metrics, heartbeat and step of a save; a job that was succeeded (it was stopped, or cut off from
the file system, for longer than `LEASE`) ends there and touches nothing. Dead is an owner that left in order, whose process this host
knows to be gone, whose launcher is that of this job (an elastic restart: torchrun has ended the old ranks, or lost their node), or whose
heartbeat is older than `LEASE`; who might live is watched until either is known. Invariants: needed are rename and link alone, which are
atomic on NFS, too, and no lock (a file system without links must make a file exclusively); what is claimed has one winner; ages are
differences of times that the file system gave, so clocks of hosts are never compared; files are opened to be looked at, since NFS only
then asks the server; all ranks hear the same, and no collective lasts as long as the leader waits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from bd3_scale.checkpoint.shard_files import write_text
from bd3_scale.distributed.layout import Layout
from bd3_scale.distributed.waiting import say
from bd3_scale.errors import CheckpointError, RecipeError, TrainingError, on_all_ranks
from bd3_scale.fault_tolerance.rank_monitor import kernel, process_is_gone

FOLDER = "owner"
CURRENT = "current"
BEAT = 5.0
"""Seconds between two touches of the heartbeat."""
LEASE = 60.0
"""Seconds without one after which an owner is dead; the interpreter may be kept from the thread for a while (a large index, a compiler)."""
PAUSE = 0.5
ROUND = 2.0
"""Seconds after which the leader tells the ranks that it still waits: `parallel.timeout` may be shorter than `LEASE`."""
UNWRITTEN = 5.0
"""Seconds that a file may be there without its text: longer, and who made it died in between, or it is damaged."""


class Owner:
    """Of this job, on every rank; made by `own` (`own_alone`)."""

    def __init__(self, folder: Path, token: str, beats: bool) -> None:
        self._place, self._token, self._closing = folder / FOLDER, token, threading.Event()
        if beats:
            threading.Thread(target=self._beat, name="owner", daemon=True).start()

    @property
    def lost(self) -> str | None:
        """Who owns the directory now, if not this job."""
        try:
            found = _read(self._place / CURRENT)
        except OSError:  # a file system that does not answer is no other job
            return None
        return None if found is None or found["token"] == self._token else _name(found)

    def check(self) -> None:
        """Raise TrainingError where another job has taken over."""
        if (other := self.lost) is not None:
            raise TrainingError(f"{other} owns {self._place.parent} now; this job ends and leaves the directory as it is")

    def release(self) -> None:
        """Leave in order: the next job need not wait."""
        if not self._closing.is_set():
            self._closing.set()
            (self._place / self._token).unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._closing.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._place / self._token)


def own(folder: Path, layout: Layout) -> Owner:
    """Make this job the owner of run directory `folder`; collective. Raises RecipeError where another one lives, CheckpointError where
    nothing can be written."""
    launchers = sorted({launcher for launcher in layout.all_gather(_launcher()) if launcher is not None})
    answers: list[tuple[str, Exception | None]] = []

    def take() -> None:
        try:
            answers.append((_taken(folder, launchers), None))
        except Exception as error:
            answers.append(("", error))

    taking = threading.Thread(target=take, name="owner", daemon=True)
    if layout.is_main_rank:
        taking.start()
    answer = None
    while answer is None:
        if layout.is_main_rank:
            taking.join(ROUND)
        answer = layout.broadcast(answers[0] if answers else None)
    token, failure = answer
    if failure is not None:
        with on_all_ranks():
            raise failure
    return Owner(folder, token, beats=layout.is_main_rank)


def own_alone(folder: Path) -> Owner:
    """Make this process, which has no world yet, the owner of run directory `folder`. Raises as `own`."""
    mine, before = _launcher(), _read(folder / FOLDER / CURRENT)
    # The launchers of the world before are those of the next one, too: whoever leads that need not wait for the end of this process.
    known = before["launchers"] if before is not None and mine in before["launchers"] else [mine]
    return Owner(folder, _taken(folder, [one for one in known if one is not None]), beats=True)


def _taken(folder: Path, launchers: list[str]) -> str:
    try:
        return _take(folder, launchers)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror or error}); fix that or set another run.dir") from error


def _take(folder: Path, launchers: list[str]) -> str:
    place, token = folder / FOLDER, secrets.token_hex(8)
    place.mkdir(parents=True, exist_ok=True)
    mine, current = place / token, place / CURRENT
    job = next((f"{name}={os.environ[name]}" for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID") if os.environ.get(name)), "")
    me = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "kernel": kernel(), "job": job, "launchers": launchers}
    write_text(mine, json.dumps(me).encode())  # on the disk, so that no power cut leaves an owner without a name
    try:
        while True:
            before = _read(current)
            if before is not None and before["token"] == token:
                return token  # linked, although the answer of a network file system was that it existed
            if before is None:
                claim = current
            else:
                _await_end(folder, before, me)
                claim = place / f"{before['token']}.next"
            try:
                _claim(mine, claim)
            except FileExistsError:  # somebody was faster: judge that one
                if before is not None and (other := _read(claim)) is not None:
                    _await_end(folder, other, me)
                    claim.unlink(missing_ok=True)
                continue
            now = _read(current)
            if before is None or (now is not None and now["token"] == before["token"]):
                if before is not None:
                    os.replace(claim, current)
                    (place / before["token"]).unlink(missing_ok=True)
                return token
            claim.unlink(missing_ok=True)  # somebody was faster, and has even finished
    except BaseException:
        mine.unlink(missing_ok=True)
        raise


def _claim(mine: Path, claim: Path) -> None:
    """Give `mine` a second name. Raises FileExistsError where somebody has it."""
    try:
        os.link(mine, claim)
    except FileExistsError:
        raise
    except OSError:  # no hard links (exFAT, mounts of object stores): then the text comes a moment after the name, and `_read` waits for it
        with open(claim, "xb") as file:
            file.write(mine.read_bytes())
            file.flush()
            os.fsync(file.fileno())


def _await_end(folder: Path, other: dict[str, Any], me: dict[str, Any]) -> None:
    """Return when the owner `other` is known to be dead. Raises RecipeError when it is known to live."""
    theirs, mine = (folder / FOLDER / who["token"] for who in (other, me))
    first, said = _time(theirs), False
    while True:
        os.utime(mine)
        last, now = _time(theirs), _time(mine)
        if first is None or last is None:
            return  # it left in order
        here = bool(me["kernel"]) and other["kernel"] == me["kernel"]
        why = None
        if here and (other["pid"] == me["pid"] or process_is_gone(other["pid"])):
            why = "its process is gone"
        elif _launcher() in other["launchers"]:
            why = "this job is its restart"
        elif now is not None and now - last > LEASE:
            why = f"it was not heard of for {now - last:.0f} s"
        if why is not None:
            say(f"{folder}: taking over from {_name(other)}: {why}")
            return
        if last != first:
            raise RecipeError(
                f"run.dir={folder} belongs to {_name(other)}, which lives; wait for its end or end it, or set run.dir to another folder"
            )
        if not said:
            said = True
            say(f"{folder} belongs to {_name(other)}: waiting for a sign of life, for {LEASE:.0f} s at most")
        time.sleep(PAUSE)


def _read(path: Path) -> dict[str, Any] | None:
    """What an owner wrote; None where there is none."""
    began = time.monotonic()
    while True:
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            if time.monotonic() - began > UNWRITTEN:
                raise CheckpointError(f"{path} is damaged; delete it if no other job uses {path.parent.parent}") from None
            time.sleep(PAUSE)


def _time(path: Path) -> float | None:
    """Of the last touch, by the clock of the file system."""
    try:
        with open(path) as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _name(who: dict[str, Any]) -> str:
    return f"another job (host {who['host']}, pid {who['pid']}{', ' if who['job'] else ''}{who['job']})"


def _launcher() -> str | None:
    """A name of the torchrun that started this rank, which it keeps over restarts; None without."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return hashlib.sha256(f"{kernel()}/{os.getppid()}".encode()).hexdigest()[:16]
