"""What a continued run is refused for, beside the keys of its recipe."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bd3_scale.errors import CheckpointError, RecipeError
from bd3_scale.training.resume import _check_data, _check_skip


def test_a_tokenizer_is_known_by_its_fingerprint_not_by_its_place() -> None:
    saved = {"tokenizer": {"name": "/old/place.json", "fingerprint": "a" * 64}, "data": {"fingerprint": "f"}}

    def data(fingerprint: str) -> Any:
        return SimpleNamespace(tokenizer=SimpleNamespace(name="/new/place.json", fingerprint=fingerprint), fingerprint="f", folder="d")

    _check_data(saved, data("a" * 64))
    with pytest.raises(CheckpointError, match=r"another tokenizer \(fingerprint aaaaaaaaaaaa\) than data.tokenizer=/new/place.json is"):
        _check_data(saved, data("b" * 64))


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ([], [[100, 200]], None),
        ([[10, 20]], [[10, 20], [100, 200]], None),
        ([[10, 20], [150, 200]], [[10, 20]], None),
        ([], [[90, 200]], "data.skip=[[100,200]]"),
        ([], [[10, 20], [120, 200]], "data.skip=[[120,200]]"),
        ([[10, 20]], [], "data.skip=[[10,20]]"),
        ([[10, 20]], [[15, 20], [90, 110]], "data.skip=[[10,20],[100,110]]"),
    ],
)
def test_only_samples_of_the_future_can_be_left_out(before: list[list[int]], now: list[list[int]], said: str | None) -> None:
    if said is None:
        _check_skip(before, now, consumed=100)
        return
    with pytest.raises(RecipeError) as refusal:
        _check_skip(before, now, consumed=100)
    assert f"gone through the samples up to 100; set {said}, or" in str(refusal.value)
