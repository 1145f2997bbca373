"""Shapes of attention that are compiled ahead of time; see `ahead_worker`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One attention; `scored`: the queries of the scored half alone."""

    head_size: int
    length: int
    block_size: int
    scored: bool = False
    groups: int = 1
    documents: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        parts = [f"d = {self.head_size}, L = {self.length}, L' = {self.block_size}", "scored rows" if self.scored else "all rows"]
        parts += [f"{self.groups} queries a key"] * (self.groups > 1) + ["documents"] * self.documents
        return ", ".join(parts + ["fp32"] * (self.dtype == "float32"))


CASES = [
    case
    for head_size in (64, 128)
    for case in (
        *(Case(head_size, length, block_size) for length, block_size in ((1024, 1), (1024, 4), (1024, 16), (2048, 16), (1000, 4))),
        *(Case(head_size, length, block_size, scored=True) for length, block_size in ((1024, 16), (1000, 4))),
        *(Case(head_size, 1024, 16, groups=groups, documents=documents) for groups, documents in ((4, False), (1, True), (4, True))),
        Case(head_size, 1024, 16, dtype="float32"),
    )
]
