"""Any layout to any other, bit for bit, and nothing in a checkpoint that depends on the layout but the list of parts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from bd3_scale.checkpoint import store
from bd3_scale.checkpoint.fragments import Fragment, share
from bd3_scale.checkpoint.index import part_key
from bd3_scale.checkpoint.region import Region
from bd3_scale.checkpoint.shard_files import ShardReader
from bd3_scale.errors import CheckpointError

NAMES = [
    "one", "flat2", "flat3", "flat4 backwards", "zero3 on 4", "tensor2", "tensor3", "tensor2 x flat2", "pipeline2", "pipeline2 x tensor2",
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(synthetic: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One state, saved once in every layout."""
    assert list(synthetic.LAYOUTS) == NAMES
    return {name: synthetic.save(tmp_path_factory.mktemp("run"), name) for name in NAMES}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", NAMES)
def test_every_layout_loads_every_other(synthetic: Any, saved: dict[str, Path], source: str, target: str) -> None:
    owned, state = synthetic.LAYOUTS[target], synthetic.full_state()

    def load(member: Any) -> None:
        live = synthetic.fragments(owned[member.rank], None)
        store.Checkpoint(saved[source]).load_into(live, member)
        for fragment in live:
            assert synthetic.same_bits(fragment.value, fragment.region.select(state[fragment.kind, fragment.name])), fragment.name

    assert synthetic.in_world(len(owned), load) == [None] * len(owned)


@pytest.mark.parametrize("layout", NAMES)
def test_saving_what_was_loaded_gives_the_same_files(synthetic: Any, saved: dict[str, Path], layout: str, tmp_path: Path) -> None:
    owned = synthetic.LAYOUTS[layout]

    def load_and_save(member: Any) -> Path:
        checkpoint = store.Checkpoint(saved[layout])
        live = synthetic.fragments(owned[member.rank], None)
        checkpoint.load_into(live, member)
        state: dict[str, Any] = {"samples_consumed": checkpoint.samples_consumed, "run": checkpoint.run, "recipe": checkpoint.recipe}
        return store.save(tmp_path, checkpoint.step, live, **state, communicator=member)

    results = synthetic.in_world(len(owned), load_and_save)
    assert results == [tmp_path / "step_00000100"] * len(owned)
    assert files(results[0]) == files(saved[layout])


def test_only_files_and_parts_depend_on_the_layout(synthetic: Any, saved: dict[str, Path]) -> None:
    documents = [json.loads((path / "index.json").read_text()) for path in saved.values()]
    for document in documents:
        del document["files"], document["checksum"], document["divisions"]
        for names in document["tensors"].values():
            for tensor in names.values():
                del tensor["parts"]
    assert all(document == documents[0] for document in documents)
    for path in saved.values():
        checkpoint = store.Checkpoint(path)
        assert (checkpoint.step, checkpoint.samples_consumed, checkpoint.recipe) == (100, 800, synthetic.RECIPE)
        assert checkpoint.run == synthetic.RUN
        assert checkpoint.kinds == ("weight", "exp_avg", "exp_avg_sq", "ema")
        assert checkpoint.parameter_count == sum(value.numel() for (kind, _), value in synthetic.full_state().items() if kind == "weight")
        assert checkpoint.versions["torch"] == torch.__version__.split("+")[0] or checkpoint.versions["torch"] == torch.__version__


def test_any_state_of_an_optimizer_is_kept(tmp_path: Path) -> None:
    """By whatever name, of some of the parameters only, and written between the weights and the average."""
    held = {("ema", "a"): 1.0, ("momentum_buffer", "a"): 2.0, ("exp_avg", "b"): 3.0, ("weight", "a"): 4.0, ("weight", "b"): 5.0}

    def fragments(value: float | None) -> list[Fragment]:
        return [Fragment(kind, name, Region.whole((3,)), torch.full((3,), value or one)) for (kind, name), one in held.items()]

    checkpoint = store.Checkpoint(store.save(tmp_path, 1, fragments(None), samples_consumed=1, run={}, recipe="a: 1"))
    live = fragments(9.0)
    checkpoint.load_into(live)
    assert [fragment.value[0].item() for fragment in live] == list(held.values())
    assert checkpoint.kinds == ("weight", "exp_avg", "momentum_buffer", "ema")
    assert list(checkpoint.shapes("momentum_buffer")) == ["a"]
    with pytest.raises(CheckpointError, match=r"momentum_buffer of b is \[3\] in this model but is missing"):
        checkpoint.load_into([Fragment("momentum_buffer", name, Region.whole((3,)), torch.zeros(3)) for name in "ab"])


def test_checkpoints_of_format_1_load(synthetic: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    """Every version since the first can be continued: an entry for every part, and the same bits."""
    for name, path in saved.items():
        old = shutil.copytree(path, tmp_path / name / path.name)
        synthetic.as_format_1(old)
        assert json.loads((old / "index.json").read_text())["format_version"] == 1
        assert synthetic.holds(old) and synthetic.holds(path)
        same = [one.index.tensors["ema"]["layers.0.output.weight"].parts for one in map(store.Checkpoint, (old, path))]
        assert list(same[0]) == list(same[1])


def test_the_safetensors_library_reads_the_same(synthetic: Any, saved: dict[str, Path]) -> None:
    state = synthetic.full_state()
    index = store.Checkpoint(saved["tensor2 x flat2"]).index
    seen = 0
    for kind, names in index.tensors.items():
        for name, tensor in names.items():
            for part in tensor.parts:
                with safe_open(saved["tensor2 x flat2"] / part.file, "pt") as file:
                    found = file.get_tensor(part_key(kind, name, part.region))
                    assert synthetic.same_bits(found, part.region.select(state[kind, name]))
                    seen += 1
    assert seen > len(state)


def test_read_and_weights(synthetic: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    state = synthetic.full_state()
    for path in saved.values():
        checkpoint = store.Checkpoint(path)
        region = Region((8, 12), 1, 3, 5, 4, 33)
        found = checkpoint.read("exp_avg", "layers.0.output.weight", region)
        assert synthetic.same_bits(found, region.select(state["exp_avg", "layers.0.output.weight"]))
        names = [name for name, _ in checkpoint.weights()]
        assert names == sorted(synthetic.SHAPES)
        assert all(synthetic.same_bits(value, state["ema", name]) for name, value in checkpoint.weights())
        assert all(synthetic.same_bits(value, state["weight", name]) for name, value in checkpoint.weights("weight"))
    plain = [fragment for fragment in synthetic.fragments(synthetic.whole(), state) if fragment.kind == "weight"]
    checkpoint = store.Checkpoint(store.save(tmp_path, 1, plain, samples_consumed=0, run={}, recipe=""))
    assert all(synthetic.same_bits(value, state["weight", name]) for name, value in checkpoint.weights())
    with pytest.raises(CheckpointError, match="has no ema"):
        next(checkpoint.weights("ema"))
    # Weights alone can be taken out of a full state.
    store.Checkpoint(saved["flat3"]).load_into([*plain])


def test_replicas_share_the_writing(synthetic: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    state = synthetic.full_state()

    def save(member: Any) -> Path:
        mine = share(synthetic.fragments(synthetic.whole(), state), member.rank, 3)
        return store.save(tmp_path, 100, mine, samples_consumed=0, run={}, recipe="", communicator=member)

    path = synthetic.in_world(3, save)[0]
    assert synthetic.holds(path)
    sizes = [4 * sum(part.region.numel for names in store.Checkpoint(path).index.tensors.values() for t in names.values()
                     for part in t.parts if part.file == f"state-{rank:05d}-of-00003.safetensors") for rank in range(3)]  # fmt: skip
    assert max(sizes) - min(sizes) <= 4


def test_ranks_without_anything_write_no_file(synthetic: Any, tmp_path: Path) -> None:
    state = synthetic.full_state()

    def save(member: Any) -> Path:
        mine = synthetic.fragments(synthetic.whole(), state) if member.rank == 1 else []
        return store.save(tmp_path, 7, mine, samples_consumed=0, run={}, recipe="", communicator=member)

    path = synthetic.in_world(3, save)[0]
    assert sorted(files(path)) == ["index.json", "recipe.yaml", "state-00000-of-00001.safetensors"]
    assert synthetic.holds(path)


def test_loading_reads_only_the_bytes_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the one pass over the files that verifies them: a dim-1 slice of wide rows, and a stretch of a flat tensor."""
    shape = (64, 8192)
    value = torch.arange(64 * 8192, dtype=torch.float32)
    path = store.save(tmp_path, 1, [Fragment("weight", "w", Region.whole(shape), value)], samples_consumed=0, run={}, recipe="")
    checkpoint = store.Checkpoint(path)
    checkpoint.verify_files()
    counted = [0]
    original = os.preadv

    def preadv(descriptor: int, buffers: list[Any], offset: int) -> int:
        count = original(descriptor, buffers, offset)
        counted[0] += count
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    header = 1000
    for region in (Region.divided(shape, 1, 2048, 2048), Region.flat(shape, 100_001, 150_000), Region((64, 8192), 1, 8191, 1, 3, 60)):
        counted[0] = 0
        assert torch.equal(checkpoint.read("weight", "w", region), region.select(value.view(shape)))
        assert counted[0] <= 4 * region.numel + header


def test_long_reads_with_small_gaps_are_cut_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bd3_scale.checkpoint.shard_files.CHUNK", 1000)
    shape = (50, 40)
    value = torch.arange(2000, dtype=torch.float32)
    path = store.save(tmp_path, 1, [Fragment("weight", "w", Region.whole(shape), value)], samples_consumed=0, run={}, recipe="")
    sizes: list[int] = []
    original = ShardReader._fill_elements

    def fill(self: ShardReader, target: torch.Tensor, at: int) -> None:
        sizes.append(target.numel())
        original(self, target, at)

    monkeypatch.setattr(ShardReader, "_fill_elements", fill)
    checkpoint = store.Checkpoint(path)
    for region in (Region.divided(shape, 1, 5, 10), Region((50, 40), 1, 0, 39, 17, 1800)):
        sizes.clear()
        assert torch.equal(checkpoint.read("weight", "w", region), region.select(value.view(shape)))
        assert len(sizes) > 5
        assert max(sizes) <= 250 + region.size


def test_values_that_are_not_plain_host_memory_are_filled(saved: dict[str, Path], synthetic: Any) -> None:
    wide = torch.zeros(13 * 6, 2)
    parameter = torch.nn.Parameter(torch.zeros(12 * 5))
    checkpoint = store.Checkpoint(saved["zero3 on 4"])
    state = synthetic.full_state()
    live = [fragment for fragment in synthetic.fragments(synthetic.whole(), None) if fragment.kind == "weight"]
    replaced = {"embedding.weight": wide[:, 1], "layers.0.qkv.weight": parameter}
    checkpoint.load_into([Fragment("weight", f.name, f.region, replaced.get(f.name, f.value)) for f in live])
    assert synthetic.same_bits(wide[:, 1], state["weight", "embedding.weight"].reshape(-1))
    assert not wide[:, 0].any()
    assert synthetic.same_bits(parameter.detach(), state["weight", "layers.0.qkv.weight"].reshape(-1))


@pytest.mark.parametrize("change", ["shape", "missing", "foreign"])
def test_another_model_is_named_and_nothing_is_touched(synthetic: Any, saved: dict[str, Path], change: str) -> None:
    """Also where the difference is on one rank of three only: all of them say the same."""

    def load(member: Any) -> str:
        regions = dict(synthetic.LAYOUTS["tensor3"][member.rank])
        if change == "shape":
            regions["embedding.weight"] = Region.whole((13, 7)) if member.rank == 2 else Region.flat((13, 7), 0, 1)
        elif change == "missing":
            regions.pop("layers.0.qkv.weight")
        elif member.rank == 1:
            regions["layers.2.norm.weight"] = Region.whole((7,))
        live = synthetic.fragments(list(regions.items()), None)
        with pytest.raises(CheckpointError) as caught:
            store.Checkpoint(saved["flat2"]).load_into(live, member)
        assert not any(fragment.value.any() for fragment in live)
        return str(caught.value)

    messages = synthetic.in_world(3, load)
    assert messages[0].startswith("checkpoint of another model: weight of ")
    assert messages == [messages[0]] * 3
    assert "\n" not in messages[0]
    expected = {
        "shape": "embedding.weight is [13, 7] in this model but is [13, 6]",
        "missing": "layers.0.qkv.weight does not exist in this model but is [12, 5]",
        "foreign": "layers.2.norm.weight is [7] in this model but is missing",
    }
    assert expected[change] in messages[0]


def test_the_ranks_divide_the_verification(synthetic: Any, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from bd3_scale.checkpoint import reader

    seen: list[str] = []
    original = reader.check_content

    def check(path: Path, record: Any) -> None:
        seen.append(path.name)
        original(path, record)

    monkeypatch.setattr(reader, "check_content", check)

    def verify(member: Any) -> None:
        checkpoint = store.Checkpoint(saved["flat3"])
        checkpoint.verify_files(communicator=member)
        checkpoint.verify_files(communicator=member)
        checkpoint.load_into(synthetic.fragments(synthetic.whole(), None), member)

    assert synthetic.in_world(2, verify) == [None, None]
    assert sorted(seen) == sorted(path.name for path in saved["flat3"].iterdir() if path.name != "index.json")


def test_fragments_that_do_not_make_up_the_state_are_refused(synthetic: Any, tmp_path: Path) -> None:
    whole = synthetic.fragments(synthetic.whole(), synthetic.full_state())
    cases = {
        "in two parts": [*whole, whole[0].part(3, 5)],
        "in no part": [whole[0].part(0, 5), *whole[1:]],
        "given twice": [*whole, whole[1]],
        "no rank has a tensor": [],
    }
    for text, fragments in cases.items():
        with pytest.raises(CheckpointError, match=text) as caught:
            store.save(tmp_path, 3, fragments, samples_consumed=0, run={}, recipe="")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_run_entries_must_be_plain(synthetic: Any, tmp_path: Path) -> None:
    whole = synthetic.fragments(synthetic.whole(), synthetic.full_state())
    for value in (float("nan"), torch.zeros(1), {1, 2}):
        with pytest.raises(CheckpointError, match="plain JSON"):
            store.save(tmp_path, 3, whole, samples_consumed=0, run={"x": value}, recipe="")
    entries: dict[Any, Any] = {"interval": (0.1, 1), 5: None}
    path = store.save(tmp_path, np.int64(3), whole, samples_consumed=np.int64(9), run=entries, recipe="")  # type: ignore[arg-type]
    assert store.Checkpoint(path).run == {"interval": [0.1, 1], "5": None}
