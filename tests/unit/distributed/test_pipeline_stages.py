"""Stages: every layer once and in order, as equal in cost as layers allow, and the costs are those of the FLOP count."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.costs import pipeline_stages
from bd3_scale.costs.flops import count_flops
from bd3_scale.costs.pipeline_stages import micro_batch_group
from bd3_scale.recipe.schema import ModelConfig

COSTS = st.lists(st.integers(1, 9).map(float), min_size=1, max_size=9)
SIDE = st.integers(0, 20).map(float)


def costliest(chunks: list[range], costs: list[float], first: float, last: float) -> float:
    each = [sum(costs[layer] for layer in chunk) for chunk in chunks]
    each[0] += first
    each[-1] += last
    return max(each)


def divisions(layers: int, chunks: int) -> list[list[range]]:
    """All of them: every choice of bounds."""
    return [[range(a, b) for a, b in pairwise((0, *bounds, layers))] for bounds in combinations(range(1, layers), chunks - 1)]


@settings(max_examples=150)
@given(COSTS, st.data(), SIDE, SIDE)
def test_no_division_has_a_cheaper_costliest_stage(costs: list[float], data: st.DataObject, first: float, last: float) -> None:
    count = data.draw(st.integers(1, len(costs)))
    chunks = pipeline_stages.divide(costs, count, first, last)
    assert len(chunks) == count and all(len(chunk) > 0 for chunk in chunks)
    assert [layer for chunk in chunks for layer in chunk] == list(range(len(costs))), "every layer once, in order"
    best = min(costliest(division, costs, first, last) for division in divisions(len(costs), count))
    assert costliest(chunks, costs, first, last) == best


@pytest.mark.parametrize(
    ("first", "last", "lengths"),
    [
        (0.0, 0.0, [3, 3, 3, 3]),
        (0.0, 2.0, [4, 3, 3, 2]),
        (2.0, 0.0, [2, 4, 3, 3]),
        (2.0, 2.0, [2, 4, 4, 2]),
        (0.0, 50.0, [9, 1, 1, 1]),
    ],
)
def test_a_heavy_end_has_fewer_layers(first: float, last: float, lengths: list[int]) -> None:
    chunks = pipeline_stages.divide([1.0] * 12, 4, first, last)
    assert len(chunks[0]) <= lengths[0] or first == 0
    assert len(chunks[-1]) <= lengths[-1] or last == 0
    assert costliest(chunks, [1.0] * 12, first, last) == costliest(pipeline_stages.given(lengths), [1.0] * 12, first, last)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_given_layers_are_those_asked_for(lengths: list[int]) -> None:
    chunks = pipeline_stages.given(lengths)
    assert [len(chunk) for chunk in chunks] == lengths
    assert [layer for chunk in chunks for layer in chunk] == list(range(sum(lengths)))


@pytest.mark.parametrize("pipeline", [1, 2, 3, 4])
@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_chunks_go_round_the_ranks(pipeline: int, virtual: int) -> None:
    """Chunk c lies on rank c mod P as its virtual stage c div P: a forward visits the ranks in a ring."""
    chunks = pipeline_stages.divide([1.0] * 12, pipeline * virtual)
    held = [pipeline_stages.of_rank(chunks, pipeline, rank) for rank in range(pipeline)]
    assert [held[chunk % pipeline][chunk // pipeline] for chunk in range(pipeline * virtual)] == chunks
    assert all(len(of_rank) == virtual for of_rank in held)


@pytest.mark.parametrize(
    "pattern",
    [AttentionPattern("block_diffusion", 64, 8), AttentionPattern("full", 64, 64), AttentionPattern("causal", 64, 1)],
    ids=lambda pattern: pattern.kind,
)
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_costs_are_the_flops_of_the_network(pattern: AttentionPattern, layers: int) -> None:
    """Their sum is the whole forward; the last layer is cheaper where rows that are not scored yield keys and values only."""
    config = ModelConfig(context=64, layers=layers, hidden=48, heads=6, key_value_heads=2, mlp="swiglu")
    costs, embedding, head = pipeline_stages.layer_costs(config, pattern, 1000, 0.5, rows=3)
    counted = count_flops(config, pattern, 1000, 0.5)
    assert len(costs) == layers and embedding > 0
    assert sum(costs) == pytest.approx(3 * counted.layers, rel=1e-12) and head == pytest.approx(3 * counted.head, rel=1e-12)
    if layers > 1:
        assert costs[-1] == costs[0] if pattern.kind == "causal" else costs[-1] < costs[0]


def test_a_large_vocabulary_takes_layers_from_the_last_stage() -> None:
    """The head weighs as much as layers do: 12 of them at 500,000 ids, nothing at 258."""
    config = ModelConfig(context=1024, layers=24, hidden=768, heads=12)
    pattern = AttentionPattern("block_diffusion", 1024, 16)
    last = []
    for vocabulary in (258, 128_000, 500_000):
        costs, embedding, head = pipeline_stages.layer_costs(config, pattern, vocabulary, 0.5, rows=8)
        chunks = pipeline_stages.divide(costs, 4, embedding, head)
        even = pipeline_stages.divide([1.0] * 24, 4)
        assert costliest(chunks, costs, embedding, head) <= costliest(even, costs, embedding, head)
        last.append(len(chunks[-1]))
    assert last[0] == 6 > last[1] > last[2] == 1
    assert pipeline_stages.layer_costs(replace(config, layers=1), pattern, 258, 0.5, rows=8)[0] == costs[-1:], (
        "the last layer is the last of any"
    )


@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
def test_micro_batch_group_is_one_that_the_interleaved_schedule_takes(pipeline: int) -> None:
    """megatron-core: at least as many as stages; what is left over must be nothing or as many as stages, too."""
    for micro_batches in range(1, 70):
        group = micro_batch_group(micro_batches, pipeline)
        assert min(pipeline, micro_batches) <= group <= micro_batches
        takes = [size for size in range(pipeline, micro_batches + 1) if micro_batches % size == 0 or micro_batches % size >= pipeline]
        assert group == (min(takes) if takes else micro_batches)
