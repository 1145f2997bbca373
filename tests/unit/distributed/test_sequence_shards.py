"""The rows of a stream over tensor ranks: all of them once, scored ones first, and put together as if never divided."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.distributed.sequence_shards import Stream

LENGTH = 24
PATTERNS = [
    AttentionPattern("block_diffusion", LENGTH, 4),
    AttentionPattern("block_diffusion", LENGTH, 12, last_clean=False),
    AttentionPattern("block_diffusion", LENGTH, 12, last_clean=False, draws=2),
    AttentionPattern("full", LENGTH, LENGTH),
    AttentionPattern("causal", LENGTH, 1),
]
CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.kind),
    pytest.mark.parametrize("ranks", [1, 2, 3, 4]),
]


def streams(pattern: AttentionPattern, ranks: int) -> list[Stream]:
    return [Stream(pattern, ranks, rank) for rank in range(ranks)]


def gathered_ids(pattern: AttentionPattern, ranks: int) -> Tensor:
    """What a gather over the ranks makes of their rows: rank by rank."""
    return torch.cat([stream.row_ids(CPU) for stream in streams(pattern, ranks)])


def test_every_row_is_on_one_rank(pattern: AttentionPattern, ranks: int) -> None:
    assert sorted(gathered_ids(pattern, ranks).tolist()) == list(range(pattern.rows))
    for stream in streams(pattern, ranks):
        ids = stream.row_ids(CPU)
        assert len(ids) == stream.rows == pattern.rows // ranks and ids.dtype == torch.int64


def test_scored_rows_come_first_and_are_shared_equally(pattern: AttentionPattern, ranks: int) -> None:
    """Gathering them alone gives the scored half in order: what the last layer and the head rest on."""
    scored = [stream.row_ids(CPU)[: stream.scored] for stream in streams(pattern, ranks)]
    assert torch.cat(scored).tolist() == list(range(pattern.scored_rows))
    for stream in streams(pattern, ranks):
        assert (stream.row_ids(CPU)[stream.scored :] >= pattern.scored_rows).all()
        natural = torch.arange(pattern.scored_rows)
        assert torch.equal(stream.gather_halves(natural), natural) and torch.equal(stream.split_halves(natural), natural)


def test_tokens_in_gathered_order_are_the_ranks_rows_side_by_side(pattern: AttentionPattern, ranks: int) -> None:
    tokens = torch.stack([torch.arange(pattern.rows), 1000 + torch.arange(pattern.rows)])
    for stream in streams(pattern, ranks):
        placed = stream.in_gathered_order(tokens)
        assert torch.equal(placed[0], gathered_ids(pattern, ranks)) and torch.equal(placed[1], placed[0] + 1000)
        mine = placed.chunk(ranks, 1)[stream.rank]
        assert torch.equal(mine[0], stream.row_ids(CPU))


def test_together_is_the_natural_order_and_apart_its_inverse(pattern: AttentionPattern, ranks: int) -> None:
    """For any trailing dimensions, as heads have them; the natural order is that of mask and positions."""
    gathered = gathered_ids(pattern, ranks)[:, None, None] * torch.tensor([[1, 10, 100], [2, 20, 200]])
    natural = torch.arange(pattern.rows)[:, None, None] * torch.tensor([[1, 10, 100], [2, 20, 200]])
    for stream in streams(pattern, ranks):
        assert torch.equal(stream.gather_halves(gathered), natural)
        assert torch.equal(stream.split_halves(natural), gathered)
        noise = torch.randn(pattern.rows, 5, generator=torch.Generator().manual_seed(0))
        assert torch.equal(stream.gather_halves(stream.split_halves(noise)), noise)
        assert torch.equal(stream.split_halves(stream.gather_halves(noise)), noise)
