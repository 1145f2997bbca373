"""Weights & Biases, where a recipe asks for it: off by default, offline or online, one run however often it is restarted.

Invariants: the mode is always passed (wandb's own default asks for a key and ends the training); a failure of wandb is
said once and never stops a run; nothing secret is written (the key stays in wandb's own environment or netrc).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bd3_scale.config import Recipe, as_dictionary


class Tracker:
    """Sends lines to wandb, or does nothing."""

    def __init__(self, recipe: Recipe, folder: Path, run_state: dict[str, Any]) -> None:
        """`run_state["wandb"]` is the id to continue; a new one is put there for the checkpoints to keep."""
        self.run: Any = None
        if recipe.tracking.wandb == "disabled":
            return
        try:
            import wandb

            run_state["wandb"] = run_state.get("wandb") or wandb.util.generate_id()
            self.run = wandb.init(
                mode=recipe.tracking.wandb,  # type: ignore[arg-type]
                project=recipe.tracking.project,
                entity=recipe.tracking.entity,
                name=recipe.run.name,
                id=run_state["wandb"],
                resume="allow",
                dir=str(folder),
                config=as_dictionary(recipe),
            )
        except Exception as error:  # wandb raises many kinds; none of them is a reason to lose a run
            self._give_up(error)

    def log(self, line: dict[str, Any]) -> None:
        if self.run is None:
            return
        try:
            kind = line.get("kind", "train")
            values = {f"{kind}/{key}": value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}
            self.run.log(values, step=line["step"])
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        print(f"bd3_scale: warning: wandb failed ({type(error).__name__}: {error}); training goes on without it", file=sys.stderr)
