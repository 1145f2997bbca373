"""One node of a job on a cluster: starts torchrun, hands a stop on to the ranks, and says by its exit status how the run stands.

    python -m bd3_scale.launching.node --run-dir DIR -- TORCHRUN-ARGUMENTS

torchrun alone cannot be asked by a scheduler: SIGUSR1 ends it without its ranks; on SIGTERM it gives the ranks 30 s and fails even
if they saved; and a run that was stopped looks to it like one that is finished. So SIGTERM, SIGINT and SIGUSR1 go to the ranks
themselves (as SIGUSR1), again and again until they are gone, and the last word is what the run wrote into its directory. It also waits
for other nodes in silence: while it has no ranks, `meeting` says who has come and where the others are expected.

Exit status, for whoever decides about another attempt:
    0            finished (`heartbeat.json` of this attempt says so)
    143          not finished, and worth another attempt: stopped, or failed after a new checkpoint was published
    another      failed without getting any further: another attempt would fail again
Invariants: 0 is never said of a run that has steps to go; attempts that are worth another one end, since each of them publishes a
checkpoint or was stopped from outside; clocks of hosts are not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType

import psutil

from bd3_scale.messages import log, show
from bd3_scale.program import run_program

UNFINISHED = 143
"""128 + SIGTERM: also what a node says that was ended from outside before this program could speak."""
AGAIN = 2.0
"""Seconds between two signals to the ranks: one that came before a rank could hear it is lost."""
LONELY = 10.0
"""Seconds without a rank after which a torchrun that is asked to stop is ended: it waits for other nodes."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PAUSE = 5.0
"""Seconds before another attempt to meet the other nodes."""
DEAF = {"PET_SIGNALS_TO_HANDLE": "SIGINT", "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGINT"}
"""What torchrun listens to (its option as a variable, and what versions without the option read)."""
JOINABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Must be 1 for every torchrun of an elastic world: else (torch 2.13) the first one keeps the ranks' store over all worlds and does not
tell its address again, so that a node that joins later waits for it in vain, for 60 s, and the whole job fails with it."""
QUIET = 2.0
"""Seconds without a rank after which somebody looks for whom torchrun waits, to say it within ten: see `meeting`."""
SPEAKER = [sys.executable, "-m", "bd3_scale.launching.meeting"]
SETTLE = 65.0
"""Seconds that a network file system may need to show what the leader wrote last (attributes are kept for up to 60)."""


@dataclass(frozen=True)
class Stand:
    """What the run directory says at one moment."""

    heartbeat: str
    checkpoint: str

    @classmethod
    def of(cls, folder: Path) -> Stand:
        return cls(_text(folder / "heartbeat.json"), _text(folder / "checkpoints" / "latest"))

    @property
    def doing(self) -> str:
        try:
            return str(json.loads(self.heartbeat)["doing"])
        except (ValueError, KeyError, TypeError):
            return ""


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


class Node:
    """torchrun on this node. `ask` may be called at any moment, by a signal handler as well."""

    def __init__(self, folder: Path, arguments: list[str], patience: float = 0.0) -> None:
        """`patience`: seconds for which a torchrun that fails before it has ranks is started again: some nodes are not there yet, or
        the store of the last attempt still answers and is about to go."""
        self.folder, self.before = folder, Stand.of(folder)
        self.arguments, self.asked = arguments, ""
        self._patient_until = time.monotonic() + patience
        self._met = False

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        self.asked = self.asked or signal.Signals(number).name

    def run(self) -> int:
        """torchrun's exit status, as a shell would give it."""
        while True:
            status = self._attempt()
            if status == 0 or self.asked or self._met or time.monotonic() + PAUSE > self._patient_until:
                return status
            log.info(f"torchrun failed with status {status} before it had ranks; again")
            time.sleep(PAUSE)

    def _attempt(self) -> int:
        torchrun = subprocess.Popen(
            [*TORCHRUN, *self.arguments],
            env={**({JOINABLE: "1"} if _elastic(self.arguments) else {}), **os.environ, **DEAF},
            start_new_session=True,
            preexec_fn=_deafen,
        )
        told = lonely = None
        speaker = _Speaker(self.arguments)
        while True:
            try:
                status = torchrun.wait(0.2)
                speaker.look(ranks=True)
                return status if status >= 0 else 128 - status
            except subprocess.TimeoutExpired:
                now, ranks = time.monotonic(), _children(torchrun.pid)
            self._met = self._met or bool(ranks)
            speaker.look(ranks=bool(ranks or self.asked))
            if not self.asked or (told is not None and now - told < AGAIN):
                continue
            if told is None:
                log.info(f"{self.asked}: asking the ranks of this node to save and leave")
            told = now
            for rank in ranks:
                _send(rank, signal.SIGUSR1)
            lonely = None if ranks else lonely or now
            if lonely is not None and now - lonely > LONELY:
                torchrun.send_signal(signal.SIGINT)

    def verdict(self, status: int, settle: float = SETTLE) -> tuple[int, str]:
        """(exit status, why). `status`: torchrun's."""
        end = time.monotonic() + (settle if status == 0 else 0.0)
        now = Stand.of(self.folder)
        while not (ended := now.heartbeat != self.before.heartbeat and now.doing in ("finished", "stopped")) and time.monotonic() < end:
            time.sleep(0.5)
            now = Stand.of(self.folder)
        if ended and now.doing == "finished" and (status == 0 or self.asked):
            return 0, "finished"
        if status == 0 or self.asked:
            return UNFINISHED, f"stopped ({self.asked or 'another node, or run.time_limit'}) and not finished; the same command goes on"
        if now.checkpoint != self.before.checkpoint:
            return UNFINISHED, f"failed with status {status} after {now.checkpoint.strip()} was saved; the same command goes on from there"
        return status, f"failed with status {status} and without a new checkpoint; fix the cause, which stands above or in the logs"


def _elastic(arguments: list[str]) -> bool:
    """Whether torchrun's --nnodes is a range, in one of its ways to write it."""
    words = [part for word in arguments for part in word.split("=", 1)]
    given = [after for word, after in pairwise(words) if word == "--nnodes"]
    return ":" in (given[0] if given else os.environ.get("PET_NNODES", ""))


class _Speaker:
    """Says for whom torchrun waits while it has no ranks, before the first ones or after others were lost; see `meeting`."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments, self._since = arguments, time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None

    def look(self, ranks: bool) -> None:
        """`ranks`: whether there are any, or nothing is to be said."""
        if ranks:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            self._process, self._since = None, time.monotonic()
        elif self._process is None and time.monotonic() - self._since > QUIET:
            self._process = subprocess.Popen([*SPEAKER, str(self._since), *self._arguments])


def _deafen() -> None:
    """SLURM sends a preemption's SIGTERM to every process of the job, whatever its session. torchrun, and the ranks until they listen,
    ignore it and SIGUSR1, whose default action would end them. SIGINT, by which we end a torchrun without ranks, is ignored in whatever
    a shell started in the background: it must be heard."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bd3_scale.launching.node", description="torchrun on one node of a cluster.")
    parser.add_argument("--directory", type=Path, help="where to work; relative paths of the recipe begin there")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run's directory (run.dir), shared by all nodes")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="how long to try again to meet the other nodes")
    parser.add_argument("--started", type=Path, metavar="FILE", help="touched now, for a liveness probe that looks at its age")
    parser.add_argument("torchrun", nargs="+", metavar="-- TORCHRUN-ARGUMENTS")
    options = parser.parse_args(arguments)
    show(note="bd3_scale: ")  # among the lines of the ranks
    if options.directory is not None:
        os.chdir(options.directory)
    if options.started is not None:
        options.started.touch()
    node = Node(options.run_dir, options.torchrun, options.wait)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, node.ask)
    status, why = node.verdict(node.run())
    log.info(f"node {os.uname().nodename}: {why}")
    return status


if __name__ == "__main__":
    run_program(main)
