"""Folders that other programs wrote: the same rows as of a folder of ours, nothing written into them, and errors that name file and row."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from bd3_scale.data.formats.row_reader import ShardReader
from bd3_scale.data.formats.streaming_compat import import_streaming
from bd3_scale.data.manifest import MANIFEST, Manifest
from bd3_scale.data.open import open_data
from bd3_scale.data.tokenizer import ByteTokenizer
from bd3_scale.prepare import main as prepare
from bd3_scale.recipe.schema import DataConfig

Rows = np.ndarray
CONTEXT, SHARD = 64, 40
"""Of the fixture `prepared`; and rows of a foreign shard."""


def mds(folder: Path, rows: list[Rows], encoding: str, convert: Callable[[Rows], Any], **more: str) -> None:
    columns = {"tokens": encoding, **dict.fromkeys(more, "str")}
    writer = import_streaming().MDSWriter(columns=columns, out=str(folder), size_limit=1 << 14, hashes=["sha1"])
    with writer:
        for row in rows:
            writer.write({"tokens": convert(row), **more})


def tar(folder: Path, rows: list[Rows], together: int) -> None:
    folder.mkdir(parents=True)
    for shard in range(0, len(rows), SHARD):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in range(shard, min(shard + SHARD, len(rows)), together):
                array = np.stack(rows[number : number + together]).astype(np.uint16)
                for name, content in (("npy", array[0] if together == 1 else array), ("txt", b"of another column")):
                    held = io.BytesIO()
                    held.write(content) if isinstance(content, bytes) else np.save(held, content)
                    information = tarfile.TarInfo(f"{number:06d}.{name}")
                    information.size = held.tell()
                    archive.addfile(information, io.BytesIO(held.getvalue()))


def arrow(folder: Path, rows: list[Rows], kind: pyarrow.DataType, **more: pyarrow.Array) -> None:
    """As `save_to_disk` of `datasets` does it: streams, state.json and dataset_info.json."""
    folder.mkdir(parents=True)
    names = []
    for number, start in enumerate(range(0, len(rows), SHARD)):
        table = pyarrow.table({"input_ids": pyarrow.array([row.tolist() for row in rows[start : start + SHARD]], kind), **more})
        names.append(f"data-{number:05d}-of-99999.arrow")
        with pyarrow.OSFile(str(folder / names[-1]), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}))
    (folder / "dataset_info.json").write_text("{}")


def index(folder: Path, name: str, content: Any) -> None:
    folder.mkdir()
    (folder / name).write_text(json.dumps(content))


WRITERS: dict[str, Callable[[Path, list[Rows]], None]] = {
    "streaming, bytes": lambda folder, rows: mds(folder, rows, "bytes", lambda row: row.astype(np.uint16).tobytes()),
    "streaming, int32": lambda folder, rows: mds(folder, rows, "ndarray:int32", lambda row: row.astype(np.int32)),
    "streaming, uint16 of a shape": lambda folder, rows: mds(folder, rows, f"ndarray:uint16:{CONTEXT}", lambda row: row.astype(np.uint16)),
    "streaming, any array": lambda folder, rows: mds(folder, rows, "ndarray", lambda row: row.astype(np.uint32), a="x", z="yy"),
    "llm-foundry": lambda folder, rows: mds(folder, rows, "bytes", lambda row: row.astype(np.int64).tobytes()),
    "webdataset, a row a member": lambda folder, rows: tar(folder, rows, 1),
    "webdataset, rows together": lambda folder, rows: tar(folder, rows, 8),
    "datasets, int32": lambda folder, rows: arrow(folder, rows, pyarrow.list_(pyarrow.int32())),
    "datasets, int64": lambda folder, rows: arrow(folder, rows, pyarrow.large_list(pyarrow.int64())),
    "datasets, of a length": lambda folder, rows: arrow(folder, rows, pyarrow.list_(pyarrow.int32(), CONTEXT)),
}


@pytest.fixture
def rows(prepared: dict[str, tuple[Path, Manifest]]) -> dict[str, list[Rows]]:
    """The rows of a folder of ours."""
    folder = prepared["mds"][0]
    found = {}
    for split in ("train", "validation"):
        with ShardReader(folder, split, context=CONTEXT, tokenizer=ByteTokenizer()) as reader:
            found[split] = list(reader.rows(range(len(reader))))
    return found


def adopt(folder: Path, source: Path, *more: str) -> int:
    return prepare(["--adopt", str(source), "--path", str(folder), "--tokenizer", "bytes", "--json", *more])


def read(folder: Path, split: str) -> Rows:
    with ShardReader(folder, split, context=CONTEXT, tokenizer=ByteTokenizer()) as reader:
        reader.verify()
        return reader.rows(range(len(reader)))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(one): (one.stat().st_mtime_ns, one.read_bytes()) for one in folder.rglob("*") if one.is_file()}


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_are_those_that_the_other_program_wrote(kind: str, rows: dict[str, list[Rows]], tmp_path: Path) -> None:
    for split, name in (("train", "train_small"), ("validation", "val_small")):
        WRITERS[kind](tmp_path / "theirs" / name, rows[split])
    before = contents(tmp_path / "theirs")
    assert adopt(tmp_path / "data", tmp_path / "theirs") == 0
    for split in rows:
        assert (read(tmp_path / "data", split) == np.stack(rows[split])).all()
    assert contents(tmp_path / "theirs") == before
    manifest = Manifest.load(tmp_path / "data" / MANIFEST)
    assert (manifest.context, manifest.row_special, manifest.train.rows) == (CONTEXT, "bos", len(rows["train"]))
    assert manifest.train.documents == (np.stack(rows["train"]) == ByteTokenizer().end_of_text).sum()
    assert adopt(tmp_path / "data", tmp_path / "theirs") == 0  # it is there


def test_batches_are_those_of_the_same_rows_prepared_here(
    prepared: dict[str, tuple[Path, Manifest]], rows: dict[str, list[Rows]], tmp_path: Path
) -> None:
    """What a run computes is a function of them: of shards of as many rows in the same order."""
    ours, manifest = prepared["mds"]
    first = 0
    (tmp_path / "theirs").mkdir()
    for number, shard in enumerate(manifest.train.shards):
        table = pyarrow.table({"input_ids": pyarrow.array([row.tolist() for row in rows["train"][first : first + shard.rows]])})
        first += shard.rows
        with pyarrow.ipc.new_file(str(tmp_path / "theirs" / f"data-{number:05d}.arrow"), table.schema) as writer:
            writer.write_table(table)
    arrow(tmp_path / "held", rows["validation"], pyarrow.list_(pyarrow.int64()))
    assert adopt(tmp_path / "data", tmp_path / "theirs", "--validation", str(tmp_path / "held")) == 0
    batches = []
    for folder in (ours, tmp_path / "data"):
        config = DataConfig(path=str(folder), tokenizer="bytes", window=2, prefetch=0)
        with (
            open_data(config, CONTEXT, leader=True, barrier=lambda: None) as data,
            data.loader(0, global_batch=16, micro_batch=None, replica=0, replicas=1) as loader,
        ):
            batches.append(np.stack([loader.micro_batches(place)[0].rows for place in range(0, 320, 16)]))
    assert (batches[0] == batches[1]).all()


@pytest.mark.parametrize(("rule", "held"), [("last:50", 50), ("0.1", None)])
def test_the_last_rows_are_held_out_also_of_one_file(rule: str, held: int | None, rows: dict[str, list[Rows]], tmp_path: Path) -> None:
    held = held or -(-len(rows["train"]) // 10)
    arrow(tmp_path / "theirs", rows["train"], pyarrow.list_(pyarrow.int64()))
    assert adopt(tmp_path / "data", tmp_path / "theirs", "--validation", rule) == 0
    found = [read(tmp_path / "data", split) for split in ("train", "validation")]
    assert len(found[1]) == held and (np.concatenate(found) == np.stack(rows["train"])).all()


def test_a_shard_that_changes_after_it_was_adopted_is_an_error(
    rows: dict[str, list[Rows]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrow(tmp_path / "theirs", rows["train"], pyarrow.list_(pyarrow.int64()))
    assert adopt(tmp_path / "data", tmp_path / "theirs") == 0
    shard = next((tmp_path / "theirs").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert prepare(["--path", str(tmp_path / "data"), "--verify"]) == 1
    assert "is damaged, its xxh64" in capsys.readouterr().err


def _uneven(rows: list[Rows]) -> list[Rows]:
    return [*rows[:13], rows[13][:50], *rows[14:]]


def _outside(rows: list[Rows]) -> list[Rows]:
    return [*rows[:44], np.where(np.arange(CONTEXT) == 9, 300, rows[44]), *rows[45:]]


INT64 = pyarrow.list_(pyarrow.int64())
BAD: dict[str, tuple[Callable[[Path, list[Rows]], None], list[str], str]] = {
    "another column": (lambda folder, rows: arrow(folder, rows, INT64), ["--column", "ids"], "has no column called ids, only input_ids"),
    "text": (
        lambda folder, rows: arrow(folder, rows, INT64, text=pyarrow.array(["x"] * len(rows))),
        ["--column", "text"],
        "its column text is string, needed are lists of whole numbers",
    ),
    "real numbers": (
        lambda folder, rows: mds(folder, rows, "ndarray:float32", lambda row: row.astype(np.float32)),
        [],
        "shard.00000.mds: its column tokens holds float32, needed are whole numbers",
    ),
    "uneven rows": (lambda folder, rows: arrow(folder, _uneven(rows), INT64), [], "row 13 has 50 tokens, needed are 64"),
    "uneven bytes": (
        lambda folder, rows: mds(folder, _uneven(rows), "bytes", lambda row: row.astype(np.int64).tobytes()),
        [],
        "shard.00000.mds: row 13 has 50 tokens, needed are 64",
    ),
    "another context": (lambda folder, rows: arrow(folder, rows, INT64), ["--context", "32"], "row 0 has 64 tokens, needed are 32"),
    "no such id": (
        lambda folder, rows: arrow(folder, _outside(rows), INT64),
        [],
        "data-00001-of-99999.arrow: row 4 has id 300 at 9, tokenizer bytes has 0 to 256",
    ),
    "padding that is no id": (
        lambda folder, rows: arrow(folder, [rows[0] - 300, *rows[1:]], INT64),
        [],
        "data-00000-of-99999.arrow: row 0 has id -",
    ),
    "filling": (
        lambda folder, rows: arrow(folder, rows[:8], INT64, attention_mask=pyarrow.array([[1] * 60 + [0] * 4] * 8)),
        [],
        "row 0 is filled up (its attention_mask has a 0)",
    ),
    "another tokenizer": (
        lambda folder, rows: mds(folder, [row + 20_000 for row in rows], "bytes", lambda row: row.astype(np.int64).tobytes()),
        [],
        "its column of bytes is no row of int64, int32 or uint16 ids below 257",
    ),
    "nothing": (lambda folder, rows: folder.mkdir(), [], "holds nothing that is known"),
    "an index without names": (
        lambda folder, rows: index(folder, "index.json", {"shards": [{"format": "mds"}]}),
        [],
        "has an entry without raw_data.basename",
    ),
    "a state without names": (
        lambda folder, rows: index(folder, "state.json", {"_data_files": [{"x": 1}]}),
        [],
        "has an entry without filename",
    ),
    "an index that leads away": (
        lambda folder, rows: index(folder, "state.json", {"_data_files": [{"filename": "../other.arrow"}]}),
        [],
        "names ../other.arrow, which",
    ),
    "all held out": (lambda folder, rows: arrow(folder, rows[:3], INT64), ["--validation", "last:3"], "would hold out 3 of 3 rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_data_is_said_by_file_and_row(
    case: str, rows: dict[str, list[Rows]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, more, said = BAD[case]
    if case == "text":
        rows["train"] = rows["train"][:SHARD]
    write(tmp_path / "theirs", rows["train"])
    assert adopt(tmp_path / "data", tmp_path / "theirs", *more) == 1
    error = capsys.readouterr().err
    assert said in error and str(tmp_path / "theirs") in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_filling_that_no_mask_tells_of_is_a_warning(
    rows: dict[str, list[Rows]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = np.arange(CONTEXT)
    fillings = {"behind": place >= 40, "before": place < 16, "before the end": (place >= 40) & (place < CONTEXT - 1), "whole": place < 0}
    for name, filling in fillings.items():
        every = [np.where(filling, 9, row) if number % 4 == 0 else row for number, row in enumerate(rows["train"])]
        if name == "before the end":
            every = [np.where(place == CONTEXT - 1, ByteTokenizer().end_of_text, row) for row in every]
        arrow(tmp_path / name, every, INT64)
        assert adopt(tmp_path / f"data of {name}", tmp_path / name) == 0
        warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        told = f"{tmp_path / name}: {-(-len(every) // 4)} of {len(every)} rows have id 9 16 times or more at an end"
        assert len(warnings) == (name != "whole") and all(told in one and "--packing document" in one for one in warnings)
    masked = pyarrow.array([[1] * CONTEXT] * SHARD)
    arrow(tmp_path / "masked", [np.where(fillings["behind"], 9, row) for row in rows["train"][:SHARD]], INT64, attention_mask=masked)
    assert adopt(tmp_path / "data of masked", tmp_path / "masked") == 0 and "warning" not in capsys.readouterr().err


def test_compressed_and_cut_shards_are_said(rows: dict[str, list[Rows]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns, folder = {"tokens": "ndarray:int32"}, tmp_path / "zipped"
    with import_streaming().MDSWriter(columns=columns, out=str(folder), compression="zstd:3") as writer:
        writer.write({"tokens": rows["train"][0].astype(np.int32)})
    assert adopt(tmp_path / "data", folder) == 1
    assert "shard.00000.mds.zstd is compressed (zstd:3)" in capsys.readouterr().err
    WRITERS["llm-foundry"](tmp_path / "cut", rows["train"])
    shard = tmp_path / "cut" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert adopt(tmp_path / "data", tmp_path / "cut") == 1
    assert "(truncated or replaced)" in capsys.readouterr().err
