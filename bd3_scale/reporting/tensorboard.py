"""TensorBoard events of a run, where `tracking.tensorboard` asks for them: the numbers of metrics.jsonl under the names wandb has.

They lie in RUN_DIR/tensorboard, a file for every start of the run; steps that a continued run makes again are in both files, and
TensorBoard shows the later. Invariant: a failure is said once and never stops a run. Made on the leader only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bd3_scale.errors import one_line
from bd3_scale.messages import log
from bd3_scale.reporting.tracking import numbers


class TensorBoard:
    """Writes events, or does nothing."""

    def __init__(self, enabled: bool, folder: Path, first_step: int) -> None:
        self._writer: Any = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1 if first_step else None)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write the numbers of a line of metrics.jsonl, named kind/key."""
        if self._writer is None:
            return
        try:
            for name, value in numbers(line).items():
                self._writer.add_scalar(name, value, line["step"])
            self._writer.flush()
        except Exception as error:  # a full disk: no reason to lose a run
            self._writer = None
            log.warning(f"tensorboard failed ({one_line(error)}); training goes on without it")

    def close(self) -> None:
        """Safe to call twice."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
