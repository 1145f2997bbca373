"""Which rows of the stream a tensor rank holds between the linears, and how they come together for attention.

Without sequence parallelism every rank holds all rows and everything here is the identity. With it, each of the R tensor
ranks holds an equal part of *both* stream halves: rank r has the r-th part of the noisy half (rows [r L/R, (r+1) L/R) of one
draw), then its R-th of the clean half (which may be shorter, see `attention.mask`). So the ranks stay equally busy where only the noisy
half goes on (last layer, head), and gathering the noisy rows alone gives them in order. What the linears gather from all ranks lies rank
by rank ("gathered order"): `together` puts it half by half, as the mask and the rotary positions have it, and `apart` is its inverse.

Invariant: for every R the rows are the same rows with the same positions, dropout and mask; only their place differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern


@dataclass(frozen=True)
class Stream:
    """The rows of one forward under `pattern`, divided over `ranks` tensor ranks; `rank` is this one. R must divide both halves."""

    pattern: AttentionPattern
    ranks: int = 1
    rank: int = 0

    @property
    def scored(self) -> int:
        """Scored rows that this rank holds; they come first."""
        return self.pattern.scored_rows // self.ranks

    @property
    def rows(self) -> int:
        """Rows that this rank holds."""
        return self.scored + self.clean

    @property
    def clean(self) -> int:
        """Rows of the clean half that this rank holds."""
        return self.pattern.clean_rows // self.ranks

    def row_ids(self, device: torch.device) -> Tensor:
        """The rows of the undivided stream that this rank holds, in its order: int64 [rows]."""
        scored = torch.arange(self.rank * self.scored, (self.rank + 1) * self.scored, device=device)
        clean = torch.arange(self.rank * self.clean, (self.rank + 1) * self.clean, device=device)
        return torch.cat([scored, clean + self.pattern.scored_rows])

    def in_gathered_order(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, all rows] -> [batch, all rows] in gathered order, so that rank r's rows are the r-th part."""
        return self.split_halves(tokens.t()).t()

    def gather_halves(self, gathered: Tensor) -> Tensor:
        """Gathered order [n, ...] -> half by half. n: all rows, or the scored ones (then the two orders are the same)."""
        if self.ranks == 1 or len(gathered) == self.pattern.scored_rows:
            return gathered
        scored, clean = gathered.unflatten(0, (self.ranks, self.rows)).split([self.scored, self.clean], 1)
        return torch.cat([scored.flatten(0, 1), clean.flatten(0, 1)])

    def split_halves(self, rows: Tensor) -> Tensor:
        """The inverse of `gather_halves`."""
        if self.ranks == 1 or len(rows) == self.pattern.scored_rows:
            return rows
        halves = rows.split([self.pattern.scored_rows, self.pattern.clean_rows])
        return torch.cat([half.unflatten(0, (self.ranks, -1)) for half in halves], 1).flatten(0, 1)
