"""Parts as columns: what was put in comes out, what meets a region is found, and a thousand ranks make a small index."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.index import FileRecord, build, parse, render
from bd3_scale.checkpoint.parts import Parts, _expanded, _progressions, encode, pack, sort, state_name
from bd3_scale.checkpoint.region import Region, intersect

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")


@given(st.lists(st.integers(0, 5) | st.integers(0, 2**40), min_size=1, max_size=40))
def test_progressions_are_the_column(values: list[int]) -> None:
    assert _expanded(_progressions(np.array(values, np.int64))).tolist() == values


def test_an_even_division_is_a_few_numbers() -> None:
    assert _progressions(np.arange(0, 8000, 8)) == [[0, 8, 1000]]
    assert _progressions(np.array([7])) == [[7, 0, 1]]
    assert _progressions(np.array([8, 16, 24, 30])) == [[8, 8, 3], [30, 0, 1]], "the last share is shorter"


@given(st.integers(0, 3), st.integers(1, 5), st.integers(0, 79), st.integers(1, 80))
def test_what_meets_a_region_is_found(dim: int, tensor: int, start: int, length: int) -> None:
    """Slices of a dimension, each cut into flat pieces, against the definition; a part may be looked at in vain, none is missed."""
    shape = (2, 5, 2, 4)
    bounds = [shape[dim] * i // min(tensor, shape[dim]) for i in range(min(tensor, shape[dim]) + 1)]
    rows: list[list[int]] = []
    for offset, end in itertools.pairwise(bounds):
        whole = Region.divided(shape, dim, offset, end - offset).numel
        cut = (whole + 1) // 2
        rows += [[len(rows), dim, offset, end - offset, 0, cut], [len(rows) + 1, dim, offset, end - offset, cut, whole]]
    table = np.array([row for row in rows if row[4] < row[5]], np.int64)
    parts = Parts(shape, len(rows), encode(sort(table)))
    assert parts.fault() is None
    asked = Region.flat(shape, start, min(80, start + length))
    assert all(part in parts.meeting(asked) for part in parts if len(intersect(part.region, asked).length))
    assert not any(part.region.span[0] >= asked.span[1] or part.region.span[1] <= asked.span[0] for part in parts.meeting(asked))


def test_a_thousand_ranks_make_a_small_index_that_is_read_by_need() -> None:
    """ZeRO 3: every rank has a share of every tensor, the last ones less or nothing. An entry for each made 190 MB at 1.3B."""
    ranks, shapes = 1024, {f"layers.{number}.weight": (67, 331) for number in range(40)} | {"norm.weight": (768,), "odd.weight": (1025,)}
    value, packed = torch.zeros(22177), {}
    for rank in range(ranks):
        mine = []
        for kind in KINDS:
            for name, shape in shapes.items():
                share = -(-int(np.prod(shape)) // ranks)
                region = Region.flat(shape, min(rank * share, int(np.prod(shape))), min((rank + 1) * share, int(np.prod(shape))))
                mine.append(Fragment(kind, name, region, value[: region.numel]))
        packed[rank] = pack([one for one in mine if one.region.numel])
    files = {state_name(rank, ranks): FileRecord(1 << 24, "0" * 64) for rank in range(ranks)} | {"recipe.yaml": FileRecord(1, "0" * 64)}
    text = render(build(1, 0, {}, {}, files, packed))
    assert len(text) < 300_000, f"{len(text):,} bytes, most of them the hashes of a thousand files"
    index = parse(text)
    parts = index.tensors["ema"]["layers.7.weight"].parts
    assert parts is index.tensors["weight"]["layers.39.weight"].parts, "divided alike: one table"
    assert [part.file for part in parts.meeting(Region.flat((67, 331), 44, 66))] == [state_name(rank, ranks) for rank in (2,)]
    assert index.tensors["weight"]["norm.weight"].parts.in_file(state_name(800, ranks)) == [], "the last ranks have none of the smallest"
