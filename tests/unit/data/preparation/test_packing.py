"""Nothing of the text is lost, added or moved by packing, but the last incomplete row, and that is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.preparation.packing import ROW_SPECIAL, Packer, held_out, storage_dtype, texts_end_at
from bd3_scale.errors import RecipeError

END = 99


@given(
    documents=st.lists(st.lists(st.integers(0, 98), max_size=30), max_size=12),
    context=st.integers(3, 17),
    special=st.sampled_from(sorted(ROW_SPECIAL)),
)
def test_rows_are_the_stream(documents: list[list[int]], context: int, special: str) -> None:
    packer = Packer(context, 100, END, special)
    rows = np.concatenate([np.empty((0, context), np.uint16), *(packer.add(np.array(document, np.int64)) for document in documents)])
    stream = [token for document in documents for token in (*document, END)]
    first = 0 if special == "none" else 1
    payload = rows[:, first : context - (special == "bos_eos")].ravel().tolist()
    assert payload == stream[: len(payload)]
    assert rows.dtype == np.uint16 and rows.shape == (packer.rows, context)
    assert packer.tokens == len(stream) and packer.documents == len(documents)
    assert packer.rows * packer.payload + packer.dropped_tokens == packer.tokens and packer.dropped_tokens < packer.payload
    if special != "none":
        assert (rows[:, 0] == END).all()
    if special == "bos_eos":
        assert (rows[:, -1] == END).all()


def test_ids_are_stored_in_the_smallest_type_and_none_is_outside_the_vocabulary() -> None:
    assert [storage_dtype(size) for size in (257, 50257, 1 << 16, (1 << 16) + 1)] == ["uint16", "uint16", "uint16", "uint32"]
    assert Packer(4, 1 << 17, END, "none").add(np.array([70_000, 1, 2])).tolist() == [[70_000, 1, 2, END]]
    for token in (100, -1):  # 100 is MASK
        with pytest.raises(ValueError, match="the vocabulary has 0 to 99"):
            Packer(4, 100, END, "none").add(np.array([1, token]))


def test_impossible_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.row_special"):
        Packer(4, 100, END, "both")
    with pytest.raises(RecipeError, match=r"model\.context 2 leaves no room"):
        Packer(2, 100, END, "bos_eos")


def test_rows_that_end_texts_are_said_to() -> None:
    assert texts_end_at("none", 1024) is None and texts_end_at("bos", 1024) is None
    assert "texts of this model end at 1,024 tokens" in (texts_end_at("bos_eos", 1024) or "")


def test_held_out_share() -> None:
    share = np.mean([held_out(f"module{number}", 0.1) for number in range(5000)])
    assert 0.08 < share < 0.12  # standard deviation 0.004
    assert held_out("a", 1.0) and not held_out("a", 0.0)
