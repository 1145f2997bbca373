"""The systems that the paper compares, and their trainings: one recipe, the objective the only difference.

Invariants: a run directory is worked on by one call at a time, whoever was killed; what was trained or measured for the same request is
kept and never made twice; what was asked differently is never taken for it; a training that was stopped is not measured.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bd3_scale.errors import UserError

ROOT = Path(__file__).parents[1]
SAID_EVERY = 60.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class System:
    """A row of the tables: how it is trained and sampled, and what the paper reports for it."""

    name: str
    overrides: tuple[str, ...]
    lm1b: float | None
    """Test perplexity on LM1B (65B tokens), table 3."""
    owt: float | None
    """Test perplexity on OpenWebText (524B tokens), table 4."""
    generation: tuple[str, str]
    """Generative perplexity under GPT-2 large (and NFE) at L = 1024 and 2048, table 7."""
    stepped: str | None = "ancestral"
    """The sampler that takes T steps per block; None: there is none."""
    finest: str | None = "first_hitting"
    """The sampler of a token per call: first_hitting, or `stepped` at T = L'. None: the more steps the better, without a limit."""
    top_p: float = 0.9
    """The nucleus that the paper's scripts sample with, there without the token that crosses it."""
    ordered: bool = True
    """Whether its place in the order of the perplexities is expected; SEDD stands beside MDLM."""
    likelihood: bool = True
    """Whether it has one."""

    @property
    def folder(self) -> str:
        """Its name in commands and in --work."""
        return "-".join(self.name.replace("'", "").replace("=", "").split()).lower()

    @property
    def nucleus(self) -> dict[str, Any]:
        """The options of sampling that `top_p` stands for."""
        return {"top_p": self.top_p, "nucleus": "strict" if self.top_p < 1 else "keep"}

    def finest_steps(self, block_size: int) -> int | None:
        """T of `finest`, where that takes one."""
        return block_size if self.finest == self.stepped else None


TUNED = "tuner.enabled=true"
"""As the paper trains block diffusion; the recipe says when and on what the interval is searched."""

SYSTEMS = (
    System("AR", ("objective.kind=ar",), 22.83, 17.54, ("14.1 (1K)", "13.2 (2K)"), stepped=None),
    System("BD3 L' = 4", ("objective.kind=bd3", "objective.block_size=4", TUNED), 28.23, 20.73, ("25.7 (1K)", "23.6 (2K)")),
    System("BD3 L' = 8", ("objective.kind=bd3", "objective.block_size=8", TUNED), 29.83, 21.68, ("30.4 (1K)", "28.2 (2K)")),
    System("BD3 L' = 16", ("objective.kind=bd3", "objective.block_size=16", TUNED), 30.60, 22.27, ("33.4 (1K)", "31.5 (2K)")),
    System("MDLM", ("objective.kind=mdlm",), 31.78, 22.98, ("46.8 (1K)", "41.3 (2K)")),
    System(
        "SEDD",
        ("objective.kind=sedd", "model.conditioning=adaln"),
        32.68,
        24.10,
        ("52.0 (1K)", "-"),
        stepped="analytic",
        finest="analytic",
        top_p=0.99,
        ordered=False,
    ),
    System(
        "SSD-LM",
        ("objective.kind=ssdlm", "model.conditioning=adaln", "objective.block_size=32"),  # the paper's 25 divides no power of two
        None,
        None,
        ("37.2 (40K), 281.3 (1K)", "35.3 (80K), 281.9 (2K)"),
        stepped="simplex",
        finest=None,
        top_p=0.95,
        ordered=False,
        likelihood=False,
    ),
)


@dataclass(frozen=True)
class Runs:
    """The trainings of one recipe and budget, and what was measured on them."""

    recipe: Path
    overrides: list[str]
    steps: int
    work: Path
    """Where they lie."""

    def folder(self, system: System) -> Path:
        """The run directory."""
        return (self.work / f"{system.folder}-{self.steps}").absolute()

    def kept(self, system: System, name: str, **asked: Any) -> dict[str, Any] | None:
        """What was measured under this name for the same request; None where that is missing."""
        path = self.folder(system) / f"{name}.json"
        document = json.loads(path.read_text()) if path.exists() else {}
        return {"system": system.name, **document} if document.pop("asked", None) == self._asked(asked) else None

    def keep(self, system: System, name: str, answer: dict[str, Any], **asked: Any) -> None:
        """Keep an answer: a whole one or none, wherever this process is killed."""
        path = self.folder(system) / f"{name}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**answer, "asked": self._asked(asked)}) + "\n")
        new.replace(path)

    @contextmanager
    def trained(self, system: System, behind: int = 0) -> Iterator[Path]:
        """The directory of the trained system, for this process alone; trains it, or goes on, unless that is done.

        `behind`: systems that are trained after it, for the time left. Raises UserError where the training fails or is stopped.
        """
        folder = self.folder(system)
        with alone(folder) as lock:
            if self.kept(system, "trained") is None:
                overrides = [*self.overrides, *system.overrides, f"training.steps={self.steps}", f"run.dir={folder}"]
                arguments = [str(self.recipe.absolute()), *overrides, "tracking.progress=false"]
                train(system.name, folder, arguments, steps=self.steps, behind=self.steps * behind, lock=lock)
                reached = reached_step(folder)
                if reached != self.steps:
                    raise UserError(f"{system.name}: its training was stopped at step {reached}; give the same command again, it goes on")
                self.keep(system, "trained", {"step": reached})
            yield folder

    def _asked(self, more: dict[str, Any]) -> dict[str, Any]:
        return {**more, "overrides": self.overrides, "recipe": self.recipe.read_text()}


def reached_step(folder: Path) -> int:
    """The step of the last checkpoint of a run; 0 where there is none."""
    from bd3_scale.checkpoint.reader import Checkpoint
    from bd3_scale.checkpoint.store import find_latest

    latest = find_latest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    return 0 if latest is None else Checkpoint(latest).step


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Hold the lock of a run, waiting for whoever has it. Yields its descriptor: the training inherits it, so that the lock
    is held for as long as one of the two lives, and a new call does not disturb the training of one that was killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder.name}: another process is at it, waiting for that", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def train(name: str, folder: Path, arguments: list[str], *, steps: int, behind: int, lock: int) -> None:
    """Run a training to its end and say now and then how far it is; what it says itself goes to a log beside `folder`.

    `behind`: steps that this call trains after it. Raises UserError with the last line of the log where it fails.
    """
    log = folder.with_name(f"{folder.name}.log")
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bd3_scale.train", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            pass_fds=[lock],
        )
        try:
            first: tuple[int, float] | None = None
            while True:
                try:
                    status = process.wait(SAID_EVERY)
                    break
                except subprocess.TimeoutExpired:
                    now, step = time.monotonic(), _step(folder, process.pid)
                first = first or (None if step is None else (step, now))
                if step is not None and first is not None and now > first[1]:
                    rate = (step - first[0]) / (now - first[1])
                    print(progress(name, step, steps, rate, behind), flush=True)
        finally:  # interrupted: the training saves what it has
            process.terminate()
            process.wait()
    if status:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise UserError(f"{name} ({log}): {lines[-1]}; fix that and give the same command again, it goes on from there")


def _step(folder: Path, process: int) -> int | None:
    """How far the training of this process is; None before its first step."""
    try:
        beat = json.loads((folder / "heartbeat.json").read_text())
    except (OSError, ValueError):
        return None
    return beat["step"] if beat["pid"] == process else None


def progress(name: str, step: int, steps: int, rate: float, behind: int) -> str:
    """A line such as "MDLM: step 300 of 900, 2.50 steps/s, 04:00 left, 16:00 for all of this call"."""
    line = f"{name}: step {step} of {steps}, {rate:.2f} steps/s"
    if rate <= 0:
        return line
    left = [tqdm.format_interval(count / rate) for count in (steps - step, steps - step + behind)]
    return f"{line}, {left[0]} left" + (f", {left[1]} for all of this call" if behind else "")
