"""The share of a micro-batch that a context rank computes: the rows of the network at its positions, and what is scored among them.

Noise, positions and keys of dropout were drawn for the undivided rows; a share takes its columns of them, so that every number is the
same for any number of ranks. Invariants: each selected position is in exactly one share; padding repeats a row that is not selected
(see `model.selected`); `joined` puts answers where the undivided micro-batch has them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.objectives.network_inputs import NetworkInputs


@dataclass(frozen=True)
class ContextShare:
    """Context rank `rank` of `ranks`; numbers of selected positions are padded to a multiple of `pad_to`. `ring`: `AttentionPattern`'s."""

    rank: int
    ranks: int
    pad_to: int = 1
    ring: bool = False

    def of(self, inputs: NetworkInputs) -> NetworkInputs:
        """This rank's share of undivided inputs on the host; they themselves where there is one rank."""
        if self.ranks == 1:
            return inputs
        pattern = inputs.pattern.share(self.rank, self.ranks, self.ring)
        rows = pattern.undivided_rows(torch.arange(pattern.rows))
        place, chosen = self._places(inputs)
        place = place[chosen]
        padding = (0, -(-max(len(place), 1) // self.pad_to) * self.pad_to - len(place))
        free = torch.ones(len(inputs.tokens) * pattern.scored_rows, dtype=torch.bool).index_fill_(0, place, False)
        spare = int(free.int().argmax())
        levels, simplex = inputs.noise_levels, inputs.simplex
        if levels is not None and levels.dim() == 2:
            blocks = rows[: pattern.scored_rows : pattern.block_size] // inputs.pattern.block_size
            levels = levels[:, blocks]
        return replace(
            inputs,
            tokens=inputs.tokens[:, rows],
            positions=inputs.positions[rows],
            selected=F.pad(place, padding, value=spare),
            targets=F.pad(inputs.targets[chosen], padding),
            weights=F.pad(inputs.weights[chosen], padding),
            pattern=pattern,
            segments=None if inputs.segments is None else inputs.segments[:, pattern.undivided_keys(torch.arange(pattern.key_rows))],
            noise_levels=levels,
            # Where there is nothing else to repeat, padding would count twice in the layer that computes the selected rows alone.
            sparse=inputs.sparse and (padding[1] == 0 or bool(free[spare])),
            simplex=None if simplex is None else simplex.moved(lambda each: each[:, rows[: pattern.scored_rows]]),
        )

    def joined(self, inputs: NetworkInputs, nll: Tensor) -> Tensor:
        """Answers [n] for the selected positions of this rank's share -> [n] of the undivided `inputs`, 0 where other ranks answer."""
        if self.ranks == 1:
            return nll
        chosen = self._places(inputs)[1].to(nll.device)
        return nll.new_zeros(len(inputs.selected)).index_put_((chosen,), nll[: len(chosen)])

    def _places(self, inputs: NetworkInputs) -> tuple[Tensor, Tensor]:
        """Of each selected position int64 [n]: its place among the scored rows of this rank, anything where another rank has it; and
        which of them this rank has, int64 ascending, padding left out."""
        whole, pattern = inputs.pattern, inputs.pattern.share(self.rank, self.ranks)
        here = torch.full((whole.scored_rows,), -1, dtype=torch.int64)
        here[pattern.undivided_rows(torch.arange(pattern.scored_rows))] = torch.arange(pattern.scored_rows)
        selected = inputs.selected.cpu()
        local = here[selected % whole.scored_rows]
        chosen = ((local >= 0) & (inputs.weights.cpu() > 0)).nonzero()[:, 0]
        return selected // whole.scored_rows * pattern.scored_rows + local, chosen
