"""A profile of a few steps on request: where the time of a step goes, by operator and kernel, and on CUDA what memory held.

`tracking.profile = [first, last]` writes, for every rank of `tracking.profile_ranks`, a trace of these steps for chrome://tracing or
https://ui.perfetto.dev into RUN_DIR/profile, and on CUDA a memory snapshot for https://pytorch.org/memory_viz beside it.
Invariant: outside of these steps nothing is measured, and a step costs one comparison.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bd3_scale.recipe.schema import TrackingConfig

MEMORY_EVENTS = 200_000
"""Allocations that a snapshot remembers, the newest ones."""


class StepProfiler:
    """Measures the updates from `first` to `last` on the ranks that were asked for."""

    def __init__(self, config: TrackingConfig, rank: int, device: torch.device, folder: Path) -> None:
        wanted = config.profile and rank in config.profile_ranks
        self._first, self._last = config.profile if wanted else (-1, -1)
        self._stem, self._cuda = folder / f"steps_{self._first}-{self._last}_rank_{rank}", device.type == "cuda"
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Update `step` is about to be made, or would be: the run ends before it."""
        if self._running is not None and step > self._last:
            self.close()
        elif step == self._first and self._running is None:
            self._stem.parent.mkdir(parents=True, exist_ok=True)
            if self._cuda:
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self._running = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._cuda], record_shapes=True)
            self._running.start()

    def close(self) -> None:
        """Write what was measured; safe to call twice."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        running.export_chrome_trace(f"{self._stem}.json.gz")
        if self._cuda:
            torch.cuda.memory._dump_snapshot(f"{self._stem}_memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
