"""Regions against the definition flatten(full.narrow(dim, offset, size))[start:stop], on tensors whose elements are their positions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.checkpoint.fragments import Fragment, copy_pieces, share
from bd3_scale.checkpoint.region import Region, intersect, tiling_fault

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    extents = shape or (1,)
    dim = draw(st.integers(0, len(extents) - 1))
    offset = draw(st.integers(0, extents[dim] - 1))
    size = draw(st.integers(1, extents[dim] - offset))
    numel = math.prod(extents) // extents[dim] * size
    start = draw(st.integers(0, numel))
    return Region(shape, dim, offset, size, start, draw(st.integers(start, numel)))


def positions(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


@settings(max_examples=300)
@given(SHAPES.flatmap(regions))
def test_runs_are_the_definition(region: Region) -> None:
    runs = region.runs()
    covered = [start + i for start, length in zip(runs.start, runs.length, strict=True) for i in range(length)]
    assert covered == region.select(positions(region.shape)).long().tolist()
    assert runs.local.tolist() == (np.cumsum(runs.length) - runs.length).tolist()
    assert region.span == ((min(covered), max(covered) + 1) if covered else (0, 0))


@settings(max_examples=500)
@given(SHAPES.flatmap(lambda shape: st.tuples(regions(shape), regions(shape))), st.booleans())
def test_copy_carries_exactly_the_shared_elements(pair: tuple[Region, Region], strided: bool) -> None:
    source_region, target_region = pair
    full = positions(source_region.shape) + 1
    source, wanted = source_region.select(full).clone(), target_region.select(full)
    target = torch.zeros(target_region.numel, 3)[:, 1] if strided else torch.zeros(target_region.numel)
    count = copy_pieces(source, target, intersect(source_region, target_region))
    shared = torch.isin(wanted, source)
    assert torch.equal(target, torch.where(shared, wanted, 0))
    assert count == int(shared.sum())
    assert (intersect(source_region, target_region).length > 0).all()


def test_rows_of_a_column_slice_are_one_strided_copy() -> None:
    """A row-parallel slice read from a dim-0 part must not cost one Python call per row."""
    pieces = intersect(Region.flat((4000, 24), 24 * 100 + 5, 24 * 3000 + 7), Region.divided((4000, 24), 1, 4, 8))
    assert len(pieces.length) > 2800
    calls = 0
    original = torch.Tensor.copy_

    def counted(self: torch.Tensor, *args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(self, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", counted)
        copy_pieces(torch.zeros(24 * 2900 + 2), torch.zeros(32000), pieces)
    assert calls <= 5


@settings(max_examples=300)
@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), st.lists(regions(shape), max_size=4))))
def test_a_tiling_is_each_element_once(case: tuple[tuple[int, ...], list[Region]]) -> None:
    shape, members = case
    times = np.zeros(math.prod(shape), dtype=int)
    for region in members:
        np.add.at(times, region.select(positions(shape)).long().numpy(), 1)
    assert (tiling_fault(shape, members) is None) == bool((times == 1).all())


@settings(max_examples=200)
@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), st.integers(1, 5))), st.randoms())
def test_divisions_tile(case: tuple[tuple[int, ...], int], random: object) -> None:
    """What engines do (slice a dim, then cut the slice into stretches) tiles, whatever the order of the parts."""
    shape, count = case
    extents = shape or (1,)
    parts = []
    for dim in [len(extents) - 1]:
        bounds = sorted({extents[dim] * i // count for i in range(count + 1)})
        for first, last in itertools.pairwise(bounds):
            numel = math.prod(extents) // extents[dim] * (last - first)
            middle = numel // 3
            parts += [Region(shape, dim, first, last - first, *cut) for cut in ((0, middle), (middle, numel))]
    random.shuffle(parts)  # type: ignore[attr-defined]
    assert tiling_fault(shape, parts) is None
    assert tiling_fault(shape, [part for part in parts if part.numel][1:]) is not None


@settings(max_examples=200)
@given(st.lists(SHAPES.flatmap(regions), max_size=5), st.integers(1, 6), st.randoms())
def test_shares_of_replicas_are_balanced_disjoint_and_complete(held: list[Region], count: int, random: object) -> None:
    def replica() -> list[Fragment]:
        members = [Fragment(KINDS[i % 4], f"tensor{i}", region, region.select(positions(region.shape))) for i, region in enumerate(held)]
        random.shuffle(members)  # type: ignore[attr-defined]  # every replica may list them in its own order
        return members

    shares = [share(replica(), index, count) for index in range(count)]
    sizes = [sum(fragment.region.numel for fragment in fragments) for fragments in shares]
    assert max(sizes) - min(sizes) <= 1
    for i, region in enumerate(held):
        parts = [fragment for fragments in shares for fragment in fragments if fragment.name == f"tensor{i}"]
        together = torch.cat([torch.zeros(0), *(fragment.value for fragment in parts)])
        assert torch.equal(together, region.select(positions(region.shape)))
        for fragment in parts:
            assert torch.equal(fragment.value, fragment.region.select(positions(region.shape)))


@pytest.mark.parametrize(
    "numbers",
    [
        ((4, 0), 0, 0, 4, 0, 0),
        ((4, 3), 2, 0, 3, 0, 12),
        ((4, 3), -1, 0, 3, 0, 12),
        ((4, 3), 1, 1, 3, 0, 12),
        ((4, 3), 1, -1, 2, 0, 8),
        ((4, 3), 0, 0, 0, 0, 0),
        ((4, 3), 0, 0, 4, 0, 13),
        ((4, 3), 0, 0, 4, -1, 12),
        ((4, 3), 0, 0, 4, 5, 4),
        ((4, 3), 0, 0, True, 0, 3),
        ((4, 3.0), 0, 0, 4, 0, 12),
    ],
)
def test_impossible_regions_are_refused(numbers: tuple) -> None:
    with pytest.raises(ValueError):
        Region(*numbers)
