"""What was written is what is read, in any order; whatever is wrong with a file is a DataError, whatever the format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bd3_scale.data import checked_once
from bd3_scale.data.cache import ATTEMPTS, Cache
from bd3_scale.data.formats.mds import xxh64
from bd3_scale.data.formats.row_reader import ShardReader
from bd3_scale.data.manifest import MANIFEST, FileEntry, Manifest
from bd3_scale.data.preparation.packing import Document
from bd3_scale.data.preparation.prepare import Packing, prepare
from bd3_scale.data.tokenizer import ByteTokenizer
from bd3_scale.errors import DataError
from tests.unit.data.conftest import random_documents

CONTEXT = 64
FORMATS = ("mds", "webdataset")
Copy = Callable[..., Path]


def reader(folder: Path, split: str = "train", **options: object) -> ShardReader:
    return ShardReader(folder, split, **{"context": CONTEXT, "tokenizer": ByteTokenizer(), **options})  # type: ignore[arg-type]


def read_all(folder: Path, **options: object) -> dict[str, np.ndarray]:
    """Every row of both splits, as a run would read them."""
    rows = {}
    for split in ("train", "validation"):
        with reader(folder, split, **options) as opened:
            rows[split] = opened.rows(np.arange(len(opened)))
    return rows


def rewritten(folder: Path, **changes: object) -> None:
    """The folder's manifest with other values, and a checksum that fits: what an attacker or a careless tool would write."""
    (folder / MANIFEST).write_bytes(replace(Manifest.load(folder / MANIFEST), **changes).to_bytes())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_come_back_in_any_order(kind: str, prepared: dict[str, tuple[Path, Manifest]]) -> None:
    folder, manifest = prepared[kind]
    rows = read_all(folder)
    stream = rows["train"][:, 1:].ravel()
    generator = np.random.default_rng(0)
    expected: list[int] = []
    for number in range(400):
        tokens = generator.integers(0, 256, generator.integers(0, 200))
        if number % 5:
            expected += [*tokens.tolist(), 256]
    assert stream.tolist() == expected[: len(stream)] and len(expected) - len(stream) == manifest.train.dropped_tokens
    assert (rows["train"][:, 0] == 256).all() and rows["train"].dtype == np.int64
    with reader(folder, open_shards=2) as opened:
        assert len(opened.shard_rows) > 4 and sum(opened.shard_rows) == len(opened) == manifest.train.rows
        chosen = np.random.default_rng(1).integers(0, len(opened), 500)
        assert (opened.rows(chosen) == rows["train"][chosen]).all()
        assert len(opened._open) <= 2
        assert opened.rows([]).shape == (0, CONTEXT)
        for outside in (-1, len(opened)):
            with pytest.raises(IndexError):
                opened.rows([outside])


def test_both_formats_hold_the_same_rows(prepared: dict[str, tuple[Path, Manifest]]) -> None:
    first, second = (read_all(prepared[kind][0]) for kind in FORMATS)
    assert all((first[split] == second[split]).all() for split in first)
    for split in ("train", "validation"):  # the same shards to the global order, too
        assert len({tuple(shard.rows for shard in prepared[kind][1].split(split).shards) for kind in FORMATS}) == 1


def test_large_vocabularies_need_four_bytes(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocabulary_size = 100_000
    documents = [Document("a", np.arange(90_000, 90_100), False), Document("b", np.arange(90_000, 90_100), True)]
    for kind in FORMATS:
        manifest = prepare(tmp_path / kind, Packing(tokenizer, 50, "none", kind), "numbers", None, lambda: documents)
        with reader(tmp_path / kind, context=50, tokenizer=tokenizer) as opened:
            assert manifest.dtype == "uint32" and opened.rows([1])[0, 0] == 90_050


def test_other_programs_can_read_the_folders(prepared: dict[str, tuple[Path, Manifest]]) -> None:
    """streaming's own reader gives the rows of MDS, webdataset's pipeline those of tar."""
    from streaming.base.format import reader_from_json
    from webdataset import WebDataset

    rows = read_all(prepared["mds"][0])["train"]
    folder = prepared["mds"][0] / "train"
    shards = [reader_from_json(str(folder), None, shard) for shard in json.loads((folder / "index.json").read_text())["shards"]]
    assert (np.stack([sample["tokens"] for shard in shards for sample in shard]) == rows).all()
    tars = sorted(str(path) for path in (prepared["webdataset"][0] / "train").glob("*.tar"))
    assert (np.concatenate([sample["npy"] for sample in WebDataset(tars, shardshuffle=False).decode()]) == rows).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_no_flipped_bit_is_read_as_data(kind: str, copy_of: Copy) -> None:
    folder = copy_of(kind)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    generator = np.random.default_rng(3)
    for trial in range(60):
        path = files[trial % len(files)]
        content = bytearray(path.read_bytes())
        content[place := int(generator.integers(len(content)))] ^= 1 << int(generator.integers(8))
        original = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(DataError, match=path.name) as error:
            read_all(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value), (path, place)
        path.write_bytes(original)
    read_all(folder)


@pytest.mark.parametrize("kind", FORMATS)
def test_missing_and_cut_files_are_named(kind: str, copy_of: Copy) -> None:
    folder = copy_of(kind)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for cut in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:cut])
            with pytest.raises(DataError, match=path.name):
                read_all(folder)
        path.unlink()
        with pytest.raises(DataError, match=path.name):
            read_all(folder)
        path.write_bytes(content)
    read_all(folder)


def test_a_missing_shard_is_known_before_it_is_needed(copy_of: Copy) -> None:
    folder = copy_of("mds")
    (folder / "train" / "shard.00003.mds").unlink()
    with pytest.raises(DataError, match=r"shard\.00003\.mds: is missing \(1 of"):
        reader(folder)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_shard_that_changes_after_it_was_checked_is_checked_again(kind: str, copy_of: Copy) -> None:
    folder = copy_of(kind)
    with reader(folder, open_shards=1) as opened:
        opened.rows([0, len(opened) - 1])
        path = folder / "train" / opened.manifest.train.shards[0].file
        content = bytearray(path.read_bytes())
        content[-len(content) // 3] ^= 4
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        with pytest.raises(DataError, match="is damaged"):
            opened.rows([0])


def test_a_shard_that_another_process_lets_go_meanwhile_is_looked_for_again(
    copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known to be whole, and gone when it is opened."""
    monkeypatch.setattr(checked_once, "_folder", lambda: tmp_path)
    folder, open_, gone = copy_of("mds"), os.open, list[str]()
    with reader(folder) as opened:
        expected = opened.rows([0])

    def late(path: str, *options: int) -> int:
        if str(path).endswith("shard.00000.mds") and not gone:
            gone.append(path)
            raise FileNotFoundError(path)
        return open_(path, *options)

    with reader(folder) as opened:
        monkeypatch.setattr(os, "open", late)
        assert (opened.rows([0]) == expected).all() and gone


def test_rows_for_another_model_are_refused_naming_both(copy_of: Copy) -> None:
    folder = copy_of("mds")
    with pytest.raises(DataError, match=r"context 64.*model\.context 128"):
        reader(folder, context=128)
    larger = ByteTokenizer()
    larger.vocabulary_size = 300
    with pytest.raises(DataError, match=r"257 ids.*has 300"):
        reader(folder, tokenizer=larger)
    other = ByteTokenizer()
    other.fingerprint = "f" * 64
    with pytest.raises(DataError, match=f"{ByteTokenizer().fingerprint[:12]}.*ffffffffffff"):
        reader(folder, tokenizer=other)


def test_ids_outside_the_vocabulary_are_refused(copy_of: Copy) -> None:
    """A shard whose hashes fit but that holds MASK, or an id that no embedding has."""
    folder = copy_of("mds")
    manifest = Manifest.load(folder / MANIFEST)
    entry = manifest.train.shards[0]
    path, index = folder / "train" / entry.file, folder / "train" / "index.json"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + np.array([257], np.uint16).tobytes())
    changed = replace(entry, xxh64=xxh64(path.read_bytes()))
    index.write_text(index.read_text().replace(entry.xxh64, changed.xxh64))
    split = replace(manifest.train, shards=(changed, *manifest.train.shards[1:]), index=entry_of(index))
    rewritten(folder, train=split)
    with pytest.raises(DataError, match="token id 257, outside the vocabulary of 257"):
        read_all(folder)


def entry_of(path: Path) -> FileEntry:
    return FileEntry(path.name, path.stat().st_size, 0, xxh64(path.read_bytes()))


@pytest.mark.parametrize("name", ["/etc/passwd", "../validation/index.json", "a/b", "..", "", ".hidden", "a\\b", "C:x", "a\nb"])
@pytest.mark.parametrize("kind", FORMATS)
def test_names_cannot_leave_their_folder(kind: str, name: str, copy_of: Copy) -> None:
    folder = copy_of(kind)
    manifest = Manifest.load(folder / MANIFEST)
    shards = (replace(manifest.train.shards[0], file=name), *manifest.train.shards[1:])
    rewritten(folder, train=replace(manifest.train, shards=shards))
    with pytest.raises(DataError, match="no plain file name"):
        reader(folder)
    index = folder / "train" / "index.json"
    index.write_text(index.read_text().replace(f'"{manifest.train.shards[0].file}"', json.dumps(name)))
    rewritten_manifest = replace(manifest, train=replace(manifest.train, index=entry_of(index)))
    (folder / MANIFEST).write_bytes(rewritten_manifest.to_bytes())
    with pytest.raises(DataError, match="no plain file name"):
        reader(folder)


def test_the_index_of_tar_shards_is_short_and_was_longer(tmp_path: Path, prepared: dict[str, tuple[Path, Manifest]]) -> None:
    """Alike members are one entry; folders of before, with an entry for each member, are read as well."""
    folder = tmp_path / "data"
    packing = Packing(ByteTokenizer(), CONTEXT, "bos", "webdataset", shard_bytes=40_000)
    manifest, index = prepare(folder, packing, "random", None, random_documents), folder / "train" / "index.json"
    expected = read_all(folder)
    assert (expected["train"] == read_all(prepared["webdataset"][0])["train"]).all()
    content = json.loads(index.read_text())
    assert [[run["count"] for run in shard["members"]] for shard in content["shards"]][:-1] == [[4]] * (len(content["shards"]) - 1)
    for shard in content["shards"]:
        shard["members"] = [
            {"offset": run["offset"] + number * run["stride"], "bytes": run["bytes"], "rows": run["rows"]}
            for run in shard["members"]
            for number in range(run["count"])
        ]
    index.write_text(json.dumps(content))
    rewritten(folder, train=replace(manifest.train, index=entry_of(index)))
    assert (read_all(folder)["train"] == expected["train"]).all()
    for key, value in (("offset", -1), ("count", 1.0), ("rows", 0), ("stride", None), ("more", 1)):
        content["shards"][0]["members"] = [{"offset": 512, "bytes": 10, "rows": 1, key: value}]
        index.write_text(json.dumps(content))
        rewritten(folder, train=replace(manifest.train, index=entry_of(index)))
        with pytest.raises(DataError, match="is not an index of tar shards"):
            reader(folder)


def test_an_index_of_pickled_objects_is_refused(copy_of: Copy) -> None:
    folder = copy_of("mds")
    manifest = Manifest.load(folder / MANIFEST)
    index = folder / "train" / "index.json"
    index.write_text(index.read_text().replace("ndarray:uint16:64", "pkl"))
    rewritten(folder, train=replace(manifest.train, index=entry_of(index)))
    with pytest.raises(DataError, match="has the columns"):
        reader(folder)


def test_an_edited_manifest_is_refused(copy_of: Copy) -> None:
    folder = copy_of("mds")
    content = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(content.replace('"context": 64', '"context": 32'))
    with pytest.raises(DataError, match="is damaged or was edited"):
        reader(folder, context=32)
    (folder / MANIFEST).write_text(content)
    rewritten(folder, format_version=2)
    with pytest.raises(DataError, match="format version 2, this program reads 1"):
        reader(folder)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_missing_or_bad_is_fetched(kind: str, copy_of: Copy, tmp_path: Path) -> None:
    remote, local = copy_of(kind, "remote"), tmp_path / "cache"
    assert Cache(local, str(remote)).manifest().fingerprint == Manifest.load(remote / MANIFEST).fingerprint
    with reader(local, cache=Cache(local, str(remote))) as opened:
        opened.rows([0])
        assert len(list((local / "train").iterdir())) == 2  # the index and one shard: only what is needed
    expected = read_all(remote)
    shards = sorted((local / "train").glob("shard*"))
    shards[0].write_bytes(b"x" * shards[0].stat().st_size)
    again = read_all(local, cache=Cache(local, str(remote)))
    assert all((again[split] == expected[split]).all() for split in expected)
    assert sorted(path.relative_to(local) for path in local.rglob("*")) == sorted(path.relative_to(remote) for path in remote.rglob("*"))


def test_a_remote_that_stays_bad_is_an_error_after_a_few_attempts(copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, local = copy_of("mds", "remote"), tmp_path / "cache"
    Cache(local, str(remote)).manifest()
    from streaming.base.storage.download import LocalDownloader

    attempts: list[str] = []
    original = LocalDownloader._download_file_impl

    def counted(self: LocalDownloader, source: str, *rest: object) -> None:
        attempts.append(source)
        original(self, source, *rest)

    monkeypatch.setattr(LocalDownloader, "_download_file_impl", counted)
    shard = remote / "train" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    with (
        reader(local, cache=Cache(local, str(remote))) as opened,
        pytest.raises(DataError, match=r"shard\.00000\.mds: cannot be fetched .*truncated"),
    ):
        opened.rows([0])
    assert attempts.count(str(shard)) == ATTEMPTS
    shard.unlink()
    with reader(local, cache=Cache(local, str(remote))) as opened, pytest.raises(DataError, match="FileNotFoundError"):
        opened.rows([0])
    assert sorted(path.name for path in (local / "train").iterdir()) == ["index.json"]
    with pytest.raises(DataError, match="Unsupported remote path"):
        Cache(tmp_path / "other", "gopher://x/y").manifest()


def test_a_cache_of_other_data_is_not_taken_for_the_remote(copy_of: Copy, prepared: dict[str, tuple[Path, Manifest]]) -> None:
    folder = copy_of("webdataset")
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(DataError, match="holds other data than"):
        Cache(folder, str(prepared["mds"][0])).manifest()
    assert (folder / MANIFEST).read_bytes() == before


def test_reading_needs_no_right_to_write(copy_of: Copy, tmp_path: Path) -> None:
    folder = copy_of("mds")
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, folder, *folder.rglob("*")]}
    read_all(folder)
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, folder, *folder.rglob("*")]} == before
