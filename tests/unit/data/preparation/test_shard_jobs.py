"""The pieces of a shard are its range of the stream, wherever documents and chunks begin."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.preparation.shard_jobs import Documents


@given(
    lengths=st.lists(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=8), min_size=1, max_size=5),
    cuts=st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True),
)
def test_pieces_are_the_stream(lengths: list[list[tuple[int, bool]]], cuts: list[float]) -> None:
    chunks, where, stream = [], [], []
    for number, documents in enumerate(lengths):
        ends = np.cumsum([length for length, _ in documents])
        tokens = 1000 * number + np.arange(ends[-1])
        chunks.append(tokens)
        for end, (length, ours) in zip(ends.tolist(), documents, strict=True):
            if ours:
                where.append((number, end - length, end))
                stream += tokens[end - length : end].tolist()
    if not where:
        return
    documents_of_split = Documents(*np.array(where, np.int64).T, np.ones(len(where), bool))
    assert documents_of_split.tokens == len(stream)
    first, last = sorted(int(cut * len(stream)) for cut in cuts)
    if first < last:
        pieces = documents_of_split.range(first, last).tolist()
        assert [token for chunk, start, stop in pieces for token in chunks[chunk][start:stop].tolist()] == stream[first:last]
        neighbours = pairwise(pieces)
        assert all((one[0], one[2]) != (other[0], other[1]) for one, other in neighbours)
