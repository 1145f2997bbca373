"""Exponential moving average of the weights, divided over the ranks exactly as the fp32 masters are.

Decay is ramped as min(decay, (1 + n) / (10 + n)) over updates n (docs/objective.md section 6). Invariant: outside `swapped`
the network computes with the trained weights, inside with the averaged ones; no copy of the whole model exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class ExponentialAverage:
    """`masters`: this rank's flat fp32 tensors (live). `publish` copies masters into the weights that compute; `settle` waits until
    masters may be written."""

    def __init__(
        self, masters: Sequence[Tensor], decay: float, publish: Callable[[], None], settle: Callable[[], None] = lambda: None
    ) -> None:
        self.masters = [master.detach() for master in masters]
        self.tensors = [master.clone() for master in self.masters]
        self.decay, self.publish, self.settle = decay, publish, settle

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the masters after optimizer step `step` (1 for the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.tensors, self.masters, 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Compute with the averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        self.settle()
        for average, master in zip(self.tensors, self.masters, strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self.publish()
