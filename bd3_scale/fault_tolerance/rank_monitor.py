"""Ends the whole job, with the name of the dead rank, when one rank dies; knows ranks, hosts and steps, but no layout.

Every rank has a daemon thread that writes a heartbeat into the rendezvous' key-value store and watches others, over a
connection of its own (a client shared with the main thread would wait behind that thread's blocking calls). The thread
beats whatever the main thread does, so a long step is not a dead rank; a process that is stopped or swapped out is one.

Who watches whom: everybody the leader, the leader everybody, and all ranks of a host each other. A rank writes 200 bytes
every second, and every few seconds reads the beats of its host, or the leader those of all: at 1,024 ranks about 1,200
requests and half a megabyte a second for the store, where all against all would be a million values per round. A ring
would cost the same, but it names one rank of a lost node, and its watcher may be lost with it. Whoever finds a dead rank
writes the *verdict*, once and for all; everybody reads it when it listens next and leaves.

Invariants: clocks of hosts are never compared; silence is counted in local monotonic time during which this rank itself
was awake (a watcher that was stopped does not accuse the others). The first verdict stands, so all name the same rank.
A rank that leaves in order says so before it goes. One process has no thread, no store and no cost.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from bd3_scale.errors import TrainingError, UserError, one_line
from bd3_scale.launcher import launched
from bd3_scale.messages import log

LONGEST_INTERVAL = 5.0
"""Seconds between two readings of the others' heartbeats at most; a rank's own beats are a second apart, or less."""
GRACE = 2.0
"""Seconds for which a broken store may mean that the job ends in order and this rank is the last to hear of it."""
VERDICT = "verdict"
NOBODY = -1
"""The finder of what has no single one."""
CURE = "the run continues from the last checkpoint with the same command"
LOST_PEER = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
"""Words in the RuntimeError of a collective whose other side is gone (gloo raises no class of its own)."""

_monitors: Counter[int] = Counter()
"""Guards made so far in this process, per rank: all ranks make theirs in the same order, so equal numbers belong together."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. Any change of it is a sign of life."""

    rank: int
    host: str
    pid: int
    kernel: str
    """Equal on two ranks exactly where their process ids mean the same; empty where that is not known."""
    step: int
    counter: int = 0
    done: bool = False
    collectives: dict[str, int] = field(default_factory=dict)
    """Group -> collectives entered in it."""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid}, last heard of at step {self.step})"


@dataclass(frozen=True)
class Work:
    """What a guard asks of the work that it guards; called in the guard's thread."""

    progress: Callable[[], int] = lambda: 0
    """The step."""
    collectives: Callable[[], dict[str, int]] = dict
    """Group -> collectives that this rank has entered in it."""
    on_verdict: Callable[[], None] = lambda: None
    """Called before this process is ended by a verdict (on whichever rank)."""


class RankMonitor:
    """`with RankMonitor(rank, world_size, patience) as monitor:` around everything between joining the world and leaving it.

    `patience`: seconds of silence after which a rank is dead. Inside, an exception of a collective becomes a TrainingError that names
    the dead rank; any other exception is announced to the other ranks and goes on. `world`: its name, since a restart by the launcher
    keeps the store but is another world. `cure`: what its people can do. `connect`, `local_ranks` and `end` are for tests.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        patience: float,
        *,
        world: str = "",
        cure: str = CURE,
        connect: Callable[[float], dist.Store] | None = None,
        local_ranks: range | None = None,
        end: Callable[[str | None, float], None] | None = None,
    ) -> None:
        self.cure = cure
        self.rank, self.world_size, self.patience = rank, world_size, float(patience)
        self.interval = min(LONGEST_INTERVAL, self.patience / 6)
        self._work = Work()
        self._complaint, self._held_back = "", 0.0
        self._local = launched().ranks_of_this_host(rank) if local_ranks is None else local_ranks
        self._connect = connect or connect_to_rendezvous
        self._end = end or end_process
        self._beat = Beat(rank, socket.gethostname(), os.getpid(), kernel(), step=0)
        self._last: dict[int, Beat] = {}
        watched = range(world_size) if rank == 0 else sorted({0, *self._local})
        self._silent = {other: 0.0 for other in watched if other != rank}
        """Seconds of silence of every rank that this one watches; a rank that is done is taken out."""
        self.verdict = ""
        self._closing, self._failure = threading.Event(), ""
        self._thread: threading.Thread | None = None
        _monitors[rank] += 1
        self._prefix = f"bd3_scale/guard/{world}/{_monitors[rank]}"

    def __enter__(self) -> Self:
        if self.world_size > 1:
            self._open()
            self._say()
            self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        if error is not None and is_lost_peer(error):
            # The thread ends this process as soon as anybody knows who is dead.
            self._failure = f" [this rank saw: {_text(error)}]"
            self._thread.join(self.patience + 3 * self.interval)
            reason = TrainingError(self.verdict or f"all ranks answer, but a collective failed: {_text(error)}; {self.cure}")
            self._leave(reason)
            raise reason from error
        self._leave(error)

    @contextlib.contextmanager
    def following(self, work: Work) -> Iterator[None]:
        """Ask `work` meanwhile. Let go of it, and of all that it holds, where it ends in order; an error is still to be told of."""
        self._work = work
        yield
        last = work.progress()
        self._work = Work(progress=lambda: last)

    def complain(self, line: str) -> None:
        """End the job, from another thread (the watchdog's): what is wrong with this rank, though it lives."""
        self._complaint = line

    def _leave(self, error: BaseException | None) -> None:
        """End the thread; tell the others that this rank is done, or why it goes."""
        assert self._thread is not None
        self._closing.set()
        self._thread.join(self.interval)
        if self._thread.is_alive():
            return  # it has the store, or a verdict and is ending this process
        try:
            if error is not None:
                reason = _text(error) if isinstance(error, UserError) else f"{type(error).__name__}: {_text(error)}; {self.cure}"
                self._accuse(f"{self._now()} ended: {reason}")
            self._say(done=True)
        except RuntimeError as lost:  # the store went first; whoever waits for this rank finds that out as well
            if error is not None:
                log.warning(f"rank {self.rank} could not tell the others why it ends: {_text(lost)}")

    def _watch(self) -> None:
        """The thread: speak and look at the processes of this host every second, listen every interval."""
        due = heard = time.monotonic()
        while not self._closing.wait(min(1.0, self.interval)):
            gone = self._killed()  # before the read below: a rank that went in order has said so by then
            try:
                self._say()
                if not gone and time.monotonic() < due:
                    continue
                due = time.monotonic() + self.interval
                verdict = self._listen()
                now = time.monotonic()
                awake, heard = min(now - heard, 2 * self.interval), now
                if not verdict and (mine := self._judge(gone, awake)):
                    verdict = self._accuse(mine)
            except RuntimeError as error:
                if self._closing.wait(GRACE) or self._reopen():
                    continue
                self._failure = self._failure or f" [this rank saw: {_text(error)}]"
                # All ranks find this at once: only the host of rank 0, which may have lost its first, speaks with many voices.
                leader = self._beat if self.rank == 0 else self._last.get(0, "rank 0")
                ended = f"{leader}, its launcher or its host has ended"
                lost = f"the store by which the ranks found each other does not answer: {ended}; {self.cure}"
                verdict = f"{self.rank if 0 in self._local else NOBODY} {self._judge(gone, 0.0) or lost}"
            if verdict:
                finder, _, self.verdict = verdict.partition(" ")
                # One line per host and from the finder, not from each of a thousand ranks.
                loud = int(finder) == self.rank or self.rank == self._local[0]
                # The store may be on this host and end with it: leave the other hosts the time to read the verdict.
                linger = self.interval + 1 if len(self._local) < self.world_size else 0.0
                with contextlib.suppress(Exception):  # a full disk must not keep this process from ending
                    self._work.on_verdict()
                self._end(f"bd3_scale: error: {self.verdict}{self._failure}" if loud else None, linger)
                return

    def _judge(self, gone: list[int], awake: float) -> str | None:
        """The verdict that follows from what is known now, if any. `awake`: seconds since the last look."""
        if self._complaint:
            # Only the leader has heard all, and hangs as well as anybody: it is left the time to say who is behind.
            self._held_back += awake
            if self.rank == 0 or self._held_back > 2 * self.interval:
                return f"{self._complaint}{named_behind([self._beat, *self._last.values()])}; {self.cure}"
        for rank in gone:
            if not self._last[rank].done:
                return f"{self._last[rank]} is gone (killed, or out of memory); {self.cure}"
        for rank in self._silent:
            self._silent[rank] += awake
        silent = [rank for rank, seconds in self._silent.items() if seconds > self.patience / 2]
        if not any(self._silent[rank] >= self.patience for rank in silent):
            return None
        # A node takes several ranks with it, whose last beats lie up to an interval apart.
        first = max(silent, key=lambda rank: self._silent[rank])
        name = str(self._last.get(first, f"rank {first} (not heard of yet)"))
        others = [rank for rank in silent if rank != first]
        also = f" and rank{'s' if others[1:] else ''} {', '.join(map(str, others[:64]))}{', ...' if others[64:] else ''}" if others else ""
        return (
            f"{name}{also} {'have' if others else 'has'} not answered for {self.patience:g} s "
            f"(killed, stopped, out of memory, or the node is gone); {self.cure}"
        )

    def _killed(self) -> list[int]:
        """Watched ranks on this host whose process does not exist any more."""
        known, kernel = self._last, self._beat.kernel
        return [r for r in self._silent if r in known and kernel and known[r].kernel == kernel and process_is_gone(known[r].pid)]

    def _now(self, done: bool = False) -> Beat:
        work, count = self._work, self._beat.counter + 1
        self._beat = replace(self._beat, step=work.progress(), counter=count, done=done, collectives=work.collectives())
        return self._beat

    def _say(self, done: bool = False) -> None:
        self._store.set(f"beat/{self.rank}", json.dumps(asdict(self._now(done))))

    def _listen(self) -> str:
        """Read the beats of the watched ranks and the verdict as "finder text", "" if there is none."""
        # A read of a key that nobody has written yet would block.
        known = [r for r in self._silent if r in self._last or self._store.check([f"beat/{r}"])]
        verdict, *beats = self._store.multi_get([VERDICT, *(f"beat/{r}" for r in known)])
        for rank, text in zip(known, beats, strict=True):
            beat = Beat(**json.loads(text))
            if beat != self._last.get(rank):
                self._last[rank], self._silent[rank] = beat, 0.0
                if beat.done:
                    del self._silent[rank]
        return verdict.decode()

    def _accuse(self, verdict: str) -> str:
        """Write the verdict unless there is one; the one that stands, as "finder text"."""
        return self._store.compare_set(VERDICT, "", f"{self.rank} {verdict}").decode()

    def _open(self) -> None:
        self._store = dist.PrefixStore(self._prefix, self._connect(self.patience))
        self._store.compare_set(VERDICT, "", "")

    def _reopen(self) -> bool:
        """A new connection after a broken one: a network may hiccup, a host that is gone stays gone."""
        try:
            with socket.create_connection(_place(), timeout=self.interval + 1):
                pass  # TCPStore itself would try for long and print its own traces
            self._open()
        except (OSError, RuntimeError):
            return False
        return True


def named_behind(beats: Collection[Beat]) -> str:
    """; and the ranks that the others wait for: they have entered fewer collectives of some group than a peer, and none has fewer than
    they in any. Empty where nothing tells them apart."""
    counts: dict[str, list[int]] = {}
    for beat in beats:
        for group, count in beat.collectives.items():
            counts.setdefault(group, []).append(count)
    waited_for = [
        beat
        for beat in beats
        if any(count < max(counts[group]) for group, count in beat.collectives.items())
        and all(count == min(counts[group]) for group, count in beat.collectives.items())
    ]
    if not waited_for:
        return ""
    shown = ", ".join(map(str, sorted(waited_for, key=lambda beat: beat.rank)[:8])) + (", ..." if waited_for[8:] else "")
    return f"; the others wait for {shown}, behind them in the number of collectives entered"


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because of another rank, not because of its arguments."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_PEER)


def end_process(line: str | None, linger: float) -> None:
    """Say it on stderr, wait `linger` seconds and end this process, whatever its main thread hangs in."""
    if line is not None:
        os.write(2, f"\n{line}\n".encode())  # not print: the main thread may hang with the lock of the stream in its hand
    time.sleep(linger)
    os._exit(TrainingError.exit_code)


def connect_to_rendezvous(timeout: float) -> dist.Store:
    """A client of the store by which the ranks found each other. `timeout`: seconds."""
    host, port = _place()
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout))


def _place() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def kernel() -> str:
    """This boot of this host and the namespace of process ids; containers of one host differ in the latter."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_is_gone(pid: int) -> bool:
    """Also for a zombie: its parent has only not asked yet. A reused process id is left to the heartbeat."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _text(error: BaseException) -> str:
    return one_line(error, 2000) or type(error).__name__
