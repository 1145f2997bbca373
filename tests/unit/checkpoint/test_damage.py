"""Whatever happens to the files of a checkpoint: an error of one line, or the very same bits; never other data, never another folder's."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bd3_scale.checkpoint import index as format_
from bd3_scale.checkpoint import store
from bd3_scale.errors import CheckpointError

MUTATIONS = 400
Random = random.Random


@pytest.fixture(scope="module")
def pristine(synthetic: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with step 100 (seed 0) in one layout and step 200 (seed 1) in another; `latest` is 200."""
    folder = tmp_path_factory.mktemp("pristine")
    synthetic.save(folder, "tensor2 x flat2", 100, seed=0)
    synthetic.save(folder, "pipeline2 x tensor2", 200, seed=1)
    return folder


def load(synthetic: Any, path: Path) -> tuple[Any, ...]:
    """All that a resume takes from a checkpoint, on two ranks."""
    owned = synthetic.LAYOUTS["flat2"]

    def resume(member: Any) -> Any:
        checkpoint = store.Checkpoint(path)
        live = synthetic.fragments(owned[member.rank], None)
        checkpoint.load_into(live, member)
        bits = [fragment.value.numpy().tobytes() for fragment in live]
        return bits, checkpoint.step, checkpoint.samples_consumed, json.dumps(checkpoint.run, sort_keys=True), checkpoint.recipe

    results = synthetic.in_world(2, resume)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return tuple(results)


def files_of(path: Path, chance: Random) -> Path:
    """Any file of a checkpoint; the index as often as all others together."""
    others = sorted(entry for entry in path.iterdir() if entry.is_file() and entry.name != "index.json")
    return path / "index.json" if chance.random() < 0.5 or not others else chance.choice(others)


def truncate(path: Path, chance: Random) -> None:
    file = files_of(path, chance)
    os.truncate(file, chance.randrange(file.stat().st_size))


def extend(path: Path, chance: Random) -> None:
    with open(files_of(path, chance), "ab") as file:
        file.write(chance.randbytes(chance.randint(1, 9)))


def flip(path: Path, chance: Random) -> None:
    file = files_of(path, chance)
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def overwrite(path: Path, chance: Random) -> None:
    file = files_of(path, chance)
    data = bytearray(file.read_bytes())
    at = chance.randrange(len(data))
    noise = chance.choice([chance.randbytes(16), bytes(16)])[: len(data) - at]
    data[at : at + len(noise)] = noise
    file.write_bytes(data)


def delete(path: Path, chance: Random) -> None:
    files_of(path, chance).unlink()


def swap(path: Path, chance: Random) -> None:
    """Two files of one checkpoint, or the same file of two checkpoints (or the whole folder of another step)."""
    first = files_of(path, chance)
    candidates = [*path.iterdir(), path.parent / "step_00000100" / first.name, path.parent / "step_00000100" / "recipe.yaml"]
    second = chance.choice(sorted(candidates))
    if second.exists():
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)


def replace_folder(path: Path, chance: Random) -> None:
    shutil.rmtree(path)
    if chance.random() < 0.7:
        shutil.copytree(path.parent / "step_00000100", path)


def link(path: Path, chance: Random) -> None:
    """A file moved out of the folder with a link in its place."""
    file = files_of(path, chance)
    outside = path.parent / "outside"
    shutil.move(file, outside)
    file.symlink_to(chance.choice([outside, Path("/dev/zero"), path.parent / "nothing"]))


def places(document: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key path in a JSON document."""
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    return [found for key, value in items for found in [(*trail, key), *places(value, (*trail, key))]]


HOSTILE: list[Any] = [
    0, 1, -1, 2**31, 2**63, 10**30, 1.5, True, None, "", "weight", "../../etc/passwd", "/etc/passwd", "..", ".", "index.json",
    "recipe.yaml", "state-00000-of-00001.safetensors", "../step_00000100/state-00000-of-00004.safetensors", [], {}, [[]], [1, 2, 3],
]  # fmt: skip


def edit(path: Path, chance: Random, forge: bool = False) -> None:
    """Change one entry of the index: another value, a value from elsewhere, removed, doubled, or its key renamed."""
    document = json.loads((path / "index.json").read_text())
    # Keys by depth first, or nearly all edits would hit the many regions.
    every = places(document)
    depth = chance.choice(sorted({len(trail) for trail in every}))
    trail = chance.choice([trail for trail in every if len(trail) == depth])
    parent = document
    for key in trail[:-1]:
        parent = parent[key]
    key, value = trail[-1], parent[trail[-1]]
    action = chance.choice(["hostile", "elsewhere", "near", "remove", "double", "rename"])
    if action == "hostile":
        parent[key] = chance.choice(HOSTILE)
    elif action == "elsewhere":
        other: Any = document
        for step in chance.choice(every):
            other = other[step]
        parent[key] = json.loads(json.dumps(other))
    elif action == "near" and type(value) is int:
        parent[key] = value + chance.choice([-1, 1, 8])
    elif action == "remove":
        del parent[key]
    elif action == "double" and isinstance(parent, list):
        parent.append(value)
    elif isinstance(parent, dict):
        parent[chance.choice(["foreign.weight", "../x", "ema", "weight", "file"])] = parent.pop(key)
    if forge:
        document["checksum"] = format_.checksum(document)
    (path / "index.json").write_text(json.dumps(document, indent=1, sort_keys=True))


DAMAGE: list[Callable[[Path, Random], None]] = [
    truncate,
    extend,
    flip,
    flip,
    overwrite,
    delete,
    swap,
    replace_folder,
    link,
    edit,
    edit,
    edit,
]


@pytest.mark.parametrize("batch", range(4))
def test_damage_is_an_error_or_changes_nothing(synthetic: Any, pristine: Path, tmp_path: Path, batch: int) -> None:
    truth = load(synthetic, pristine / "step_00000200")
    refused = 0
    for seed in range(batch * MUTATIONS // 4, (batch + 1) * MUTATIONS // 4):
        chance = Random(seed)
        folder = tmp_path / str(seed)
        shutil.copytree(pristine, folder)
        damage = chance.choice(DAMAGE)
        for _ in range(chance.choice([1, 1, 2])):
            if (folder / "step_00000200" / "index.json").exists():
                damage(folder / "step_00000200", chance)
        try:
            path = store.find_latest(folder)
            assert path is not None
            found = load(synthetic, path)
        except CheckpointError as error:
            refused += 1
            text = str(error)
            assert "\n" not in text, (seed, damage)
            assert "step_00000200" in text, (seed, damage, text)
            # A swap between the two steps may damage both.
            if damage is not swap:
                assert f"step_00000100: write that name into {folder / 'latest'}" in text, (seed, damage, text)
        else:
            assert found == truth, (seed, damage)
        shutil.rmtree(folder)
    assert refused > MUTATIONS // 4 * 0.75


def test_a_forged_index_is_never_followed_out_of_its_folder(
    synthetic: Any, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the checksum recomputed an index can lie about its own tensors, but it raises nothing else and reads no other file."""
    truth = load(synthetic, pristine / "step_00000200")[0]
    opened: set[Path] = set()
    original = open

    def watched(file: Any, *arguments: Any, **named: Any) -> Any:
        opened.add(Path(file).resolve())
        return original(file, *arguments, **named)

    monkeypatch.setattr("bd3_scale.checkpoint.shard_files.open", watched, raising=False)
    refused = 0
    for seed in range(250):
        folder = tmp_path / str(seed)
        shutil.copytree(pristine, folder)
        path = folder / "step_00000200"
        if seed % 2:
            synthetic.as_format_1(path)
        edit(path, Random(seed), forge=True)
        opened.clear()
        try:
            found = load(synthetic, path)[0]
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            # Only the free entries (step, run, versions ...) can be forged like this: the bits are bound by hashes and keys.
            assert found[0] == truth[0], seed
        opened.discard(folder / "step_00000100" / "index.json")  # looked at to offer it
        assert all(file.parent == path for file in opened), (seed, opened)
        shutil.rmtree(folder)
    assert refused > 100


BIG = 10**12
FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    # As the first format has it, with an entry for every part.
    "absolute path": lambda d: rename_file(d, "/etc/passwd"),
    "parent path": lambda d: rename_file(d, "../step_00000100/state-00000-of-00004.safetensors"),
    "other name": lambda d: rename_file(d, "weights.safetensors"),
    "index as data": lambda d: rename_file(d, "index.json"),
    "huge shape": lambda d: d["tensors"]["weight"].update(
        {"big": {"shape": [BIG, 2], "parts": [part("weight", "big", 1, 0, 1, 0, BIG), part("weight", "big", 1, 1, 1, 0, BIG)]}}
    ),
    "foreign kind": lambda d: d["tensors"].update({"gradient": d["tensors"]["weight"]}),
    "part twice": lambda d: first(d)["parts"].append(first(d)["parts"][0]),
    "part gone": lambda d: first(d)["parts"].pop(),
    "one part for both": lambda d: halves(d, "weight").__setitem__(1, halves(d, "weight")[0]),
    "elements of another kind": lambda d: halves(d, "weight")[0].update(key=halves(d, "ema")[0]["key"]),
    "no parts": lambda d: first(d).update(parts=[], shape=[1]),
    "no tensors": lambda d: d.update(tensors={}),
    "empty kinds": lambda d: d.update(tensors={"weight": {}}),
    "file not listed": lambda d: d["files"].pop("state-00003-of-00004.safetensors"),
    "recipe not listed": lambda d: d["files"].pop("recipe.yaml"),
    "newer format": lambda d: d.update(format_version=3),
    "format one as a truth": lambda d: d.update(format_version=True),
    "other format": lambda d: d.update(format="pickle"),
    "negative step": lambda d: d.update(step=-1),
    "negative bytes": lambda d: d["files"]["recipe.yaml"].update(bytes=-1),
    "hash in capitals": lambda d: d["files"]["recipe.yaml"].update(sha256="A" * 64),
    "unknown field": lambda d: d.update(hook="os.system"),
}


FORGED_DIVISIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "huge count": lambda d: column(d, 4).__setitem__(0, [0, 0, BIG]),
    "huge counts": lambda d: division(d).__setitem__(slice(None), [[[0, 0, BIG]] for _ in range(6)]),
    "beyond all integers": lambda d: column(d, 5).__setitem__(0, [10**30, 1, 2]),
    "steps below nothing": lambda d: column(d, 4).__setitem__(0, [0, -1, 2]),
    "half a number": lambda d: column(d, 4).__setitem__(0, [0, 0.5, 2]),
    "truths": lambda d: column(d, 0).__setitem__(0, [True, True, 2]),
    "no progression": lambda d: column(d, 0).clear(),
    "no column": lambda d: division(d).pop(),
    "uneven columns": lambda d: column(d, 3).append([1, 0, 1]),
    "foreign file": lambda d: column(d, 0).__setitem__(0, [3, 1, 2]),
    "dim that is none": lambda d: column(d, 1).__setitem__(0, [7, 0, 2]),
    "outside of the tensor": lambda d: column(d, 2).__setitem__(0, [0, 8, 2]),
    "the same half twice": lambda d: column(d, 2).__setitem__(0, [0, 0, 2]),
    "nothing of it": lambda d: column(d, 5).__setitem__(0, [0, 0, 2]),
    "no such division": lambda d: first(d).update(parts=99),
    "division before the first": lambda d: first(d).update(parts=-1),
    "division of another tensor": lambda d: first(d).update(parts=d["tensors"]["weight"]["temperature"]["parts"]),
    "shape without extent": lambda d: first(d).update(shape=[0, 6]),
    "shape of another size": lambda d: first(d).update(shape=[13, 7]),
    "huge shape": lambda d: first(d).update(shape=[BIG, BIG, BIG]),
    "no divisions": lambda d: d.pop("divisions"),
    "divisions that are none": lambda d: d.update(divisions=7),
    "format 1": lambda d: d.update(format_version=1),
}


def division(document: dict[str, Any]) -> list[Any]:
    """Of a tensor that two ranks have a half of."""
    return document["divisions"][halves(document, "weight")]  # type: ignore[call-overload, no-any-return]


def column(document: dict[str, Any], number: int) -> list[Any]:
    return division(document)[number]  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", FORGED_DIVISIONS)
def test_forged_divisions_are_refused(pristine: Path, tmp_path: Path, case: str) -> None:
    path = shutil.copytree(pristine / "step_00000200", tmp_path / "step_00000200")
    document = json.loads((path / "index.json").read_text())
    FORGED_DIVISIONS[case](document)
    document["checksum"] = format_.checksum(document)
    (path / "index.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        store.Checkpoint(path)
    assert "\n" not in str(caught.value)


def first(document: dict[str, Any]) -> dict[str, Any]:
    return document["tensors"]["weight"]["embedding.weight"]


def halves(document: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Two parts of one size."""
    return document["tensors"][kind]["layers.0.output.weight"]["parts"]


def part(kind: str, name: str, *numbers: int) -> dict[str, Any]:
    key = f"{kind}/{name}@" + ",".join(str(number) for number in numbers)
    return {"file": "state-00000-of-00004.safetensors", "key": key, "region": dict(zip(format_.REGION_FIELDS, numbers, strict=True))}


def rename_file(document: dict[str, Any], name: str) -> None:
    text = json.dumps(document).replace("state-00002-of-00004.safetensors", name)
    document.update(json.loads(text))


@pytest.mark.parametrize("case", FORGED)
def test_forged_indices_are_refused(synthetic: Any, pristine: Path, tmp_path: Path, case: str) -> None:
    path = shutil.copytree(pristine / "step_00000200", tmp_path / "step_00000200")
    synthetic.as_format_1(path)
    document = json.loads((path / "index.json").read_text())
    FORGED[case](document)
    document["checksum"] = format_.checksum(document)
    (path / "index.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        store.Checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"", b"[" * 200_000, b'{"a": ' * 100_000, b"\xff\xfe", b"1" * 10_000, b"NaN", b'{"format": 1, "format": 1}', b"null"]
)
def test_an_index_that_is_no_index(pristine: Path, tmp_path: Path, text: bytes) -> None:
    path = shutil.copytree(pristine / "step_00000200", tmp_path / "step_00000200")
    (path / "index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        store.Checkpoint(path)


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _rename_key(header: dict[str, Any]) -> None:
    header["foreign"] = header.pop(next(iter(header)))


SHARD_LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "foreign tensor": _rename_key,
    "one more": lambda h: h.update(extra=next(iter(h.values()))),
    "other type": lambda h: next(iter(h.values())).update(dtype="I32"),
    "other shape": lambda h: next(iter(h.values())).update(shape=[1]),
    "outside": lambda h: next(iter(h.values())).update(data_offsets=[10**9, 10**9 + 4]),
    "negative": lambda h: next(iter(h.values())).update(data_offsets=[-4, 0]),
    "no offsets": lambda h: next(iter(h.values())).pop("data_offsets"),
    "not a mapping": lambda h: h.update({next(iter(h)): None}),
}


@pytest.mark.parametrize("case", SHARD_LIES)
def test_a_shard_that_is_not_what_its_index_says(synthetic: Any, tmp_path: Path, case: str) -> None:
    """Even where its size and hash were made to fit: the parts are looked for by name, type and size."""
    path = synthetic.save(tmp_path, "one", 100)
    file = path / "state-00000-of-00001.safetensors"
    header, elements = _header(file.read_bytes())
    SHARD_LIES[case](header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + elements)
    document = json.loads((path / "index.json").read_text())
    document["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    document["checksum"] = format_.checksum(document)
    (path / "index.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=file.name):
        load(synthetic, path)


def test_short_files_and_links_are_seen_when_opening(synthetic: Any, tmp_path: Path) -> None:
    """`find_latest` offers nothing that would fail at once; a link is refused even where it leads to the right bytes."""
    for name in ("state-00001-of-00002.safetensors", "recipe.yaml", "index.json"):
        path = synthetic.save(tmp_path, "flat2", 200)
        shutil.move(path / name, tmp_path / "outside")
        (path / name).symlink_to(tmp_path / "outside")
        with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
            store.Checkpoint(path)
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
            store.Checkpoint(path)
        (path / name).unlink()
        shutil.move(tmp_path / "outside", path / name)
        os.truncate(path / name, (path / name).stat().st_size - 3)
        with pytest.raises(CheckpointError, match=name):
            store.find_latest(tmp_path)


def test_a_file_damaged_after_it_was_verified_is_not_a_crash(synthetic: Any, tmp_path: Path) -> None:
    path = synthetic.save(tmp_path, "one", 100)
    checkpoint = store.Checkpoint(path)
    checkpoint.verify_files()
    file = path / "state-00000-of-00001.safetensors"
    os.truncate(file, file.stat().st_size - 20)
    with pytest.raises(CheckpointError, match=r"step_00000100: state-.*(ends too early|inside the file)"):
        checkpoint.load_into(synthetic.fragments(synthetic.whole(), None))
    with pytest.raises(CheckpointError):
        list(checkpoint.weights())
