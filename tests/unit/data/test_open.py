"""`open_data`: prepares once, refuses what does not fit the recipe, rebuilds nothing, and never leaves a rank waiting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bd3_scale.data import open as module
from bd3_scale.data.open import open_data, open_held_out
from bd3_scale.data.preparation import documentation, packing
from bd3_scale.errors import DataError
from bd3_scale.recipe.schema import DataConfig

TOKENS = 40_000


class Barrier:
    """Counts how often a rank came to it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Documentation of a few invented modules, in bytes."""
    source = tmp_path / "library"
    source.mkdir()
    for number in range(60):
        words = " ".join(f"the {chr(97 + number % 26)}{chr(97 + step % 26)} value of this option is used" for step in range(40))
        (source / f"m{number:02}.py").write_text(f'"""{words} in {"ab" * number} case."""\n')
    monkeypatch.setattr(documentation, "source_files", lambda: iter(sorted((path.stem, path) for path in source.glob("*.py"))))
    monkeypatch.setattr(documentation, "held_out", lambda name: packing.held_out(name, 0.3))
    return DataConfig(path=str(tmp_path / "data"), source="documentation", source_tokens=TOKENS, tokenizer="bytes")


def test_the_leader_prepares_while_the_others_wait(config: DataConfig) -> None:
    barrier = Barrier()
    with pytest.raises(DataError, match=r"bd3 prepare"):
        open_data(config, 128, leader=False, barrier=barrier)  # it only waits
    assert barrier.calls == 1 and not Path(config.path).exists()
    with open_data(config, 128, leader=True, barrier=barrier) as first, open_data(config, 128, leader=False, barrier=barrier) as second:
        assert barrier.calls == 3 and first.fingerprint == second.fingerprint
        assert first.manifest.train.tokens + first.manifest.validation.tokens <= TOKENS
        assert (first.validation.rows([0]) == second.validation.rows([0])).all()
        assert first.tokenizer.decode(first.train.rows([0])[0]).startswith("<|endoftext|>")


def test_a_leader_that_fails_leaves_nobody_waiting(config: DataConfig) -> None:
    barrier = Barrier()
    for broken in (
        replace(config, tokenizer="/none.json"),
        replace(config, source_tokens=10),
        replace(config, remote="/none", source=None),
    ):
        barrier.calls = 0
        for leader in (True, False):
            with pytest.raises(DataError):
                open_data(broken, 128, leader=leader, barrier=barrier)
        assert barrier.calls == 2


def test_a_folder_that_does_not_fit_is_refused_and_left_alone(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    open_data(config, 128, leader=True, barrier=Barrier()).close()
    before = {path: path.stat().st_mtime_ns for path in Path(config.path).rglob("*")}
    monkeypatch.setattr(module, "prepare", None)  # never called again
    for changed, context, message in (
        (config, 256, r"context 128.*model\.context 256"),
        (replace(config, source_tokens=TOKENS + 1), 128, f"source_tokens={TOKENS}, asked for is source_tokens={TOKENS + 1}"),
        (replace(config, tokenizer="gpt2"), 128, r"257 ids \(bytes\), data\.tokenizer=gpt2 has 50257"),
        (replace(config, row_special="none"), 128, "row_special=bos, asked for is row_special=none"),
        (replace(config, format="webdataset"), 128, "format=mds, asked for is format=webdataset"),
    ):
        with pytest.raises(DataError, match=message):
            open_data(changed, context, leader=True, barrier=Barrier())
    open_data(replace(config, source=None), 128, leader=True, barrier=Barrier()).close()  # as it is
    assert {path: path.stat().st_mtime_ns for path in Path(config.path).rglob("*")} == before


@pytest.mark.parametrize("kind", ["mds", "webdataset"])
def test_a_remote_folder_is_served_through_the_local_one(kind: str, config: DataConfig, tmp_path: Path) -> None:
    with open_data(replace(config, format=kind), 128, leader=True, barrier=Barrier()) as original:
        expected = original.train.rows(np.arange(len(original.train)))
    cached = replace(config, format=kind, remote=config.path, path=str(tmp_path / "cache"))
    with open_data(cached, 128, leader=True, barrier=Barrier()) as leader, open_data(cached, 128, leader=False, barrier=Barrier()) as other:
        assert (leader.train.rows(np.arange(len(leader.train))) == expected).all()
        assert (other.train.rows([3]) == expected[3]).all()


def test_no_source_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"--path {tmp_path}/none --context 512 --tokenizer bytes"):
        open_data(DataConfig(path=str(tmp_path / "none"), tokenizer="bytes"), 512, leader=True, barrier=Barrier())


def test_another_held_out_set_is_named_in_its_errors(config: DataConfig, tmp_path: Path) -> None:
    with open_data(config, 128, leader=True, barrier=Barrier()) as data:
        with open_held_out("same", config.path, config, 128, data.tokenizer) as rows:
            assert (rows.rows([0]) == data.validation.rows([0])).all()
        for path, context in ((str(tmp_path / "none"), 128), (config.path, 64)):
            with pytest.raises(DataError) as refusal:
                open_held_out("other", path, config, context, data.tokenizer)
            assert f"validation.sets.other={path}: " in str(refusal.value) and "data.path" not in str(refusal.value)
