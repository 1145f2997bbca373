"""Weights & Biases, where a recipe asks for it: off by default, offline or online, one run however often it is restarted.

Beside its id a run directory remembers where it lies, so that a copy is noticed: it gets a run of its own, and original and copy never go
on as one. Invariants: the mode is always passed (wandb's own default asks for a key and ends the training); a failure of wandb is
said once and never stops a run; nothing secret is written (the key stays in wandb's own environment or netrc, credentials
inside URLs are blotted out). Made on the leader only.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bd3_scale.errors import one_line, without_credentials
from bd3_scale.messages import log
from bd3_scale.recipe import Recipe, as_dictionary

ID_FILE = Path("wandb") / "run_id"
"""In the run directory: the id, for a run that is killed before its first checkpoint; the path of the directory; its host."""


class Tracker:
    """Sends lines to wandb, or does nothing."""

    def __init__(self, recipe: Recipe, folder: Path, run_id: str | None = None) -> None:
        """`folder`: the run directory. `run_id`: the one to continue, where the folder remembers none."""
        self.run: Any = None
        self.run_id = run_id
        """Continued or new, for checkpoints to keep; as it was given where nothing is tracked."""
        if recipe.tracking.wandb == "disabled":
            return
        try:
            import wandb

            self.run_id = run_id = _remembered(folder) or run_id or secrets.token_hex(4)
            (folder / ID_FILE).parent.mkdir(parents=True, exist_ok=True)
            (folder / ID_FILE).write_text(f"{run_id}\n{folder.resolve()}\n{socket.gethostname()}\n", "utf-8")
            self.run = wandb.init(
                mode=recipe.tracking.wandb,  # type: ignore[arg-type]
                project=recipe.tracking.project,
                entity=recipe.tracking.entity,
                name=recipe.run.name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=without_credentials(as_dictionary(recipe)),
                # Our own files have what is printed, and a progress bar is no log.
                settings=wandb.Settings(console="off"),
            )
            # The step is a value, not wandb's own counter: that one refuses the steps that a continued run makes again.
            self.run.define_metric("step", hidden=True)
            self.run.define_metric("*", step_metric="step")
        except Exception as error:  # wandb raises many kinds; none of them is a reason to lose a run
            self._give_up(error)

    def log(self, line: Mapping[str, Any]) -> None:
        """Send the numbers of a line of metrics.jsonl, named kind/key."""
        if self.run is None:
            return
        try:
            self.run.log({"step": line["step"], **numbers(line)})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Hand over what is still waiting; safe to call twice."""
        run, self.run = self.run, None
        if run is not None:
            try:
                run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        log.warning(f"wandb failed ({type(error).__name__}: {one_line(error)}); training goes on without it")


def _remembered(folder: Path) -> str | None:
    """The id to go on with: of a directory that lies where it lay or was moved; a new one of a copy; None where there is none."""
    run_id, where, host = _read(folder)
    if not run_id or where in ("", str(folder.resolve())):
        return run_id or None
    if host == socket.gethostname() and _read(Path(where))[0] != run_id:
        return run_id
    fresh = secrets.token_hex(4)
    log.warning(
        f"{folder} is a copy of {where} ({host}), run {run_id} of wandb: this one goes on as the new run {fresh}; "
        f"to go on as {run_id}, write that alone into {folder / ID_FILE}"
    )
    return fresh


def _read(folder: Path) -> tuple[str, str, str]:
    """(id, path, host), each "" where it is not written down."""
    path = folder / ID_FILE
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    run_id, where, host = [line.strip() for line in [*lines, "", "", ""][:3]]
    return run_id, where, host


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """{kind/key: value} of a line of metrics.jsonl."""
    kind = line.get("kind", "train")
    if kind == "tuner" and "block_size" in line:  # one of a mixture's
        kind = f"tuner/block_size_{line['block_size']}"
    values = {f"{kind}/{key}": value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}
    interval = line.get("interval")
    if interval is not None:
        values |= {f"{kind}/interval_{name}": float(value) for name, value in zip(("beta", "omega"), interval, strict=True)}
    for size, one in line.get("block_sizes", {}).items():
        values |= {f"{kind}/block_size_{size}/{key}": value for key, value in one.items() if isinstance(value, (int, float))}
    return values
