"""AdamW that leaves out a step on the device: where the gradient norm is not a number, or far above what it was lately.

The norm is known on the device only, so the decision is made there: torch's fused AdamW takes a flag that makes it change
nothing, neither weights nor moments nor its clock. Nobody waits for the host. As in OLMo-core a norm is a spike when it
exceeds the mean of the last norms by `spike_deviations` standard deviations; norms of steps left out are not remembered.

Where the loss itself becomes another one (`forget`), what is remembered of the old one does not count.

Invariants: every rank decides alike, because the norm is the global one; all that decides is in `state`, which the
checkpoint has, so that a continued run leaves out the steps that the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

REMEMBERED = 128
"""Norms that a new one is compared with; before half of them are known, nothing is a spike."""


class SkipStepRule:
    """Which steps are left out. `spike_deviations` 0: only those whose norm is not finite."""

    def __init__(self, spike_deviations: float, device: torch.device) -> None:
        self.spike_deviations = spike_deviations
        self.norms = torch.zeros(REMEMBERED, device=device)
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        """Steps taken, left out, and left out in a row."""
        self.known = torch.zeros((), dtype=torch.int64, device=device)
        """Norms remembered since the last `forget`."""

    def should_skip(self, norm: Tensor) -> Tensor:
        """1.0 where a step of this global gradient norm is to be left out, else 0.0: fp32 scalar on the device. Call once per step."""
        norm = norm.to(self.norms.device, torch.float32)
        known = self.known
        bad = ~torch.isfinite(norm)
        if self.spike_deviations:
            held = torch.arange(REMEMBERED, device=norm.device) < known
            count = held.sum().clamp(min=2)
            mean = (self.norms * held).sum() / count
            deviation = (((self.norms - mean) * held).square().sum() / (count - 1)).sqrt()
            bad |= (known >= REMEMBERED // 2) & (norm > mean + self.spike_deviations * deviation)
        place = torch.remainder(known, REMEMBERED)
        here = torch.arange(REMEMBERED, device=norm.device) == place
        self.norms = torch.where(here & ~bad, norm, self.norms)
        self.known = known + ~bad
        one = torch.ones((), dtype=torch.int64, device=norm.device)
        self.counts = torch.stack([self.counts[0] + ~bad, self.counts[1] + bad, torch.where(bad, self.counts[2] + one, 0 * one)])
        return bad.float()

    def forget(self) -> None:
        """The loss is another one from here on (block size, interval): norms of the old one say nothing of it."""
        self.known = torch.zeros_like(self.known)

    @property
    def skipped_so_far(self) -> int:
        """Steps left out since the run began; waits for the device."""
        return int(self.counts[1])

    def state(self) -> dict[str, Any]:
        """For the checkpoint; waits for the device."""
        return {"norms": self.norms.tolist(), "counts": self.counts.tolist(), "known": self.known.item()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.norms.copy_(torch.tensor(state["norms"]))
        self.counts.copy_(torch.tensor(state["counts"]))
        self.known.fill_(state.get("known", state["counts"][0]))  # earlier versions forgot nothing


class SkippingAdamW(torch.optim.AdamW):
    """Fused AdamW under a `SkipStepRule`. `norm` gives the global gradient norm of the step that is made; whoever drives this
    may call `step` once per parameter group (DeepSpeed does), so `begin` says where a step begins."""

    def __init__(self, groups: Iterable[Any], betas: tuple[float, float], epsilon: float, rule: SkipStepRule) -> None:
        super().__init__(groups, lr=0.0, betas=betas, eps=epsilon, fused=True)
        self.rule = rule
        self.norm: Callable[[], Tensor] | None = None
        self.found_inf: Tensor | None = None
        """torch's name for the flag that makes a fused step change nothing."""

    def begin(self, norm: Callable[[], Tensor]) -> None:
        self.norm, self.found_inf = norm, None

    def decide(self) -> None:
        """Decide about the step that has begun, unless that is done."""
        if self.found_inf is None:
            assert self.norm is not None, "no step has begun"
            self.found_inf = self.rule.should_skip(self.norm())

    def step(self, closure: Any = None) -> Any:
        self.decide()
        return super().step(closure)

    def states(self, master: Tensor) -> dict[str, Tensor]:
        """Live fp32 states of one of the parameters, by name; zeros where no step has been taken."""
        state = self.state[master]
        if "exp_avg" not in state:
            # On the device for fused AdamW, else on the host: where torch's AdamW itself would make it.
            step = torch.zeros((), dtype=torch.float32, device=master.device if master.is_cuda else "cpu")
            state.update(step=step, exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
        return {name: value for name, value in state.items() if name != "step"}

    def resume(self, masters: Iterable[Tensor], updates: int) -> None:
        """Go on after as many updates of `masters` (steps left out are none)."""
        for master in masters:
            self.states(master)
            if "step" in self.state[master]:
                self.state[master]["step"].fill_(updates)
