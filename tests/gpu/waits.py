"""Notes where the host waits for the device while a training makes its steps.

On CUDA by torch's synchronisation debug mode, which warns of each copy that blocks and of each number that is read (it does not see
`synchronize()` and waits of streams for each other). In a rehearsal by the operators whose result the host reads.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bd3_scale.training.trainer import Trainer
from tests.gpu.device import REHEARSAL

UNWATCHED_STEPS = 3
"""In the first ones kernels are compiled, buffers made, and ZeRO 3 learns what is needed when."""
FRAMES = 4


class Waits:
    """`found`: the innermost lines of Python at each wait."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.steps = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        if REHEARSAL:
            from tests.distributed.reads_worker import Reads

            reads = Reads()
            with reads:
                yield
            self.found += reads.found.elements()
            return
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._seen
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def _seen(self, message: Any, *where: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            frames = [f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
            self.found.append(" < ".join(reversed(frames[-FRAMES:])))

    @contextmanager
    def of_steps(self) -> Iterator[None]:
        """Watch what every training in here does on the device in a step: forward and backward, optimizer, average, what the report
        keeps; not the making of rows on the host, nor what a logging step reads."""
        made, update = Trainer.__init__, Trainer.update
        armed = False

        def when_armed(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                if not armed:
                    return function(*arguments, **named)
                with self.watching():
                    return function(*arguments, **named)

            return run

        def initialised(trainer: Trainer, *arguments: Any) -> None:
            made(trainer, *arguments)
            trainer.first = trainer.step + UNWATCHED_STEPS  # type: ignore[attr-defined]
            owners: tuple[tuple[Any, tuple[str, ...]], ...] = (
                (trainer.engine, ("forward_backward", "step")),
                (trainer.ema, ("update",)),
                (trainer.report, ("add",)),
                (trainer.heartbeat, ("beat",)),
            )
            for owner, names in owners:
                for name in names:
                    setattr(owner, name, when_armed(getattr(owner, name)))

        def updated(trainer: Trainer) -> Any:
            nonlocal armed
            armed = trainer.step >= trainer.first  # type: ignore[attr-defined]
            self.steps += armed
            return update(trainer)

        Trainer.__init__, Trainer.update = initialised, updated  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Trainer.__init__, Trainer.update = made, update  # type: ignore[method-assign]
