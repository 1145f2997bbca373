"""Muon: hidden matrices are updated by their momentum, made orthogonal by Newton-Schulz; everything else by AdamW.

As torch.optim.Muon (Keller Jordan's): M <- mu M + (1 - mu) G, U = mu M + (1 - mu) G (Nesterov), O = U made orthogonal in five steps of
the quintic iteration, W <- (1 - rate x decay) W - rate x 0.2 sqrt(max(rows, columns)) O. The scale is Moonlight's (torch's
"match_rms_adamw"): the update is as large as AdamW's, whose learning rate and weight decay are used for both. Matrices that are packed
into one weight (keys and values, gate and value of SwiGLU) are made orthogonal one by one, as where they are weights of their own.

Newton-Schulz runs in bf16 where the run does, as in torch, and in fp32 where the run does, so that layouts agree to fp32's rounding.

Invariants: as in adamw.py, a step that is left out changes nothing; momentum and weights are updated where their elements are held, in
any division; only what is made orthogonal is gathered, and by one rank (`matrix_owners.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_scale.costs.orthogonal_step import STEPS, packed
from bd3_scale.optimizers.adamw import SkippingAdamW, SkipStepRule
from bd3_scale.optimizers.matrix_owners import MatrixOwners, Piece
from bd3_scale.recipe.schema import ModelConfig

COEFFICIENTS, EPSILON = (3.4445, -4.7750, 2.0315), 1e-7
"""torch's."""
MOMENTUM = "momentum_buffer"
Held = tuple[Tensor, list[tuple[int, Piece]]]
"""A master, and (offset, piece) of what lies in it of hidden matrices."""


def orthogonal(matrix: Tensor) -> Tensor:
    """[rows, columns] -> about the nearest matrix with orthonormal rows (or columns), in the same dtype: singular values between 0.7 and
    1.2 or so. Where it is 0, 0."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def scale(name: str, shape: tuple[int, ...], config: ModelConfig) -> float:
    """What the update of a weight of `shape` is multiplied with, so that its elements are about as large as AdamW's."""
    return 0.2 * math.sqrt(max(shape[0] // packed(name, shape[0], config)[0], shape[1]))


def direction(name: str, momentum: Tensor, config: ModelConfig) -> Tensor:
    """[rows, columns] of a weight -> each of its matrices made orthogonal."""
    count, neighbours = packed(name, momentum.shape[0], config)
    if count == 1:
        return orthogonal(momentum)
    matrices = momentum.view(-1, count, neighbours, momentum.shape[1])
    found = [orthogonal(matrices[:, index].flatten(0, 1)).view(-1, neighbours, momentum.shape[1]) for index in range(count)]
    return torch.stack(found, 1).view_as(momentum)


class Muon(SkippingAdamW):
    """Of the groups, those with a "momentum" hold hidden matrices, whole or in parts; `bind` says of which. `dtype`: of Newton-Schulz."""

    def __init__(
        self, groups: Iterable[Any], betas: tuple[float, float], epsilon: float, rule: SkipStepRule, config: ModelConfig, dtype: torch.dtype
    ) -> None:
        super().__init__(groups, betas, epsilon, rule)
        self.config, self.dtype = config, dtype

    def bind(self, steps: Sequence[Sequence[Held]], group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Say what masters hold. `steps`: of each call of `step` that updates hidden matrices, its masters; `group`: the ranks that
        together hold every matrix once. Collective."""
        pieces = [[piece for _, held in masters for _, piece in held] for masters in steps]
        self._owners = [MatrixOwners(one, group, self.dtype, device) for one in pieces]
        self._masters = [list(masters) for masters in steps]
        self._hidden = {id(master) for masters in steps for master, pieces in masters if pieces}

    def states(self, master: Tensor) -> dict[str, Tensor]:
        if id(master) not in self._hidden:
            return super().states(master)
        return {MOMENTUM: self._momentum(master)}

    def _momentum(self, master: Tensor) -> Tensor:
        if MOMENTUM not in self.state[master]:
            self.state[master][MOMENTUM] = torch.zeros_like(master)
        return self.state[master][MOMENTUM]  # type: ignore[no-any-return]

    def step(self, closure: Any = None) -> Any:
        self.decide()
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        super().step(closure)
        self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._step_matrices(group)

    @torch.no_grad()
    def _step_matrices(self, group: dict[str, Any]) -> None:
        masters = group["params"]
        call = self._call(masters)
        if call is None:
            return
        assert self.found_inf is not None
        left_out, taken = self.found_inf.bool(), 1 - self.found_inf
        gradients = [master.grad for master in masters]
        momenta = [self._momentum(master) for master in masters]
        for gradient, momentum in zip(gradients, momenta, strict=True):
            torch.where(left_out, momentum, gradient, out=gradient)  # to move momentum towards itself is to leave it
        if masters:
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            torch._foreach_lerp_(gradients, momenta, group["momentum"])
            torch._foreach_mul_(masters, 1 - group["lr"] * group["weight_decay"] * taken)
        places = [(master, offset, piece) for master, pieces in self._masters[call] for offset, piece in pieces]

        def part(tensor: Tensor, number: int) -> Tensor:
            _, offset, piece = places[number]
            return tensor.view(-1)[offset : offset + piece.region.numel]

        def change(number: int, found: Tensor) -> None:
            master, _, piece = places[number]
            rate = group["lr"] * scale(piece.key[0], piece.region.shape, self.config)
            part(master, number).addcmul_(found.float(), taken, value=-rate)

        values = [part(master.grad, number) for number, (master, _, _) in enumerate(places)]  # type: ignore[arg-type]
        self._owners[call].apply(values, lambda name, momentum: direction(name, momentum, self.config), change)

    def _call(self, masters: Sequence[Tensor]) -> int | None:
        """Which of the bound steps updates these; None where, on every rank, none does."""
        if len(self._masters) == 1:
            return 0
        known = {id(master): call for call, one in enumerate(self._masters) for master, _ in one}
        return known[id(masters[0])] if masters else None
