"""The same texts in the same order from every kind of file; what is not as it should be is named and never skipped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bd3_scale.data.preparation.corpus import corpus_files, require_once
from bd3_scale.data.preparation.records import texts
from bd3_scale.errors import DataError

TEXTS = [f"Document {number}, with é and\nlines." * (1 + number % 7) for number in range(2500)]


def write(path: Path, documents: list[str] = TEXTS) -> Path:
    import pyarrow
    import zstandard
    from pyarrow import parquet

    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in documents).encode()
    plain = "\n\n".join(documents).encode()
    content = lines if ".jsonl" in path.name else plain
    table = pyarrow.table({"text": documents, "n": [1] * len(documents)})
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".gz":
        middle = len(content) // 2
        path.write_bytes(gzip.compress(content[:middle]) + gzip.compress(content[middle:]))  # as pigz and cat make them
    elif path.suffix == ".zst":
        middle = len(content) // 2
        path.write_bytes(zstandard.compress(content[:middle]) + zstandard.compress(content[middle:]))
    elif path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=700)
    elif path.suffix == ".arrow":
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    else:
        path.write_bytes(content)
    return path


KINDS = ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst", "a.parquet", "a.arrow"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_texts(name: str, tmp_path: Path) -> None:
    found = list(texts([write(tmp_path / name)]))
    assert [text for text, _ in found] == TEXTS
    places = [place for _, place in found]
    assert places == sorted(places) and places[-1] <= (tmp_path / name).stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_file_that_is_cut_short_is_named(name: str, part: float, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DataError, match=name):
        list(texts([path]))


def test_order_of_files_folders_and_patterns(tmp_path: Path) -> None:
    for folder, names in {"b": ["2.jsonl", "10.jsonl", "state.json"], "a": ["x.jsonl"]}.items():
        for name in names:
            write(tmp_path / folder / name, [f"{folder}/{name}"])
    asked = [str(tmp_path / "b"), str(tmp_path / "*" / "x.jsonl")]
    assert [text for text, _ in texts(corpus_files(asked, ["state.json"]))] == ["b/10.jsonl", "b/2.jsonl", "a/x.jsonl"]


def test_what_is_no_corpus_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "c.csv").write_text("a,b")
    for source, message in (
        ("empty", "holds no file"),
        ("c.csv", "kind is not known"),
        ("d.txt", "no such file"),
        ("*.gz", "holds no file"),
    ):
        with pytest.raises(DataError, match=message):
            corpus_files([str(tmp_path / source)])
    with pytest.raises(DataError, match="no column 'body', only text, n"):
        list(texts([write(tmp_path / "a.parquet")], "body"))


def saved(folder: Path, documents: list[str]) -> Path:
    """As `datasets` saves it, with what its `map` leaves beside it."""
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (documents[::2], documents[1::2]), strict=True):
        write(folder / name, part)
    write(folder / "cache-1b2c3d.arrow", ["a text that map made"])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_data_set_is_what_its_state_lists(tmp_path: Path) -> None:
    folder = saved(tmp_path / "owt", ["a", "b", "c", "d"])
    assert [text for text, _ in texts(corpus_files([str(folder)]))] == ["a", "c", "b", "d"]
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow: cannot be read"):
        corpus_files([str(folder)])
    for state, message in (
        ("{", "is not the state"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "is not the state"),
        ('{"_data_files": [], "_indices_files": [{"filename": "i.arrow"}]}', "selection of rows"),
    ):
        (folder / "state.json").write_text(state)
        with pytest.raises(DataError, match=message):
            corpus_files([str(folder)])


def test_splits_are_not_mixed_and_no_file_is_read_twice(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for split in ("train", "test"):
        saved(tmp_path / "all" / split, ["a", "b"])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="holds the splits test, train"):
        corpus_files([str(tmp_path / "all")])
    path = write(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "link.jsonl").symlink_to(path)
    require_once([path])
    for twice in ([path, path], [path, tmp_path / "link.jsonl"]):
        with pytest.raises(DataError, match="in the corpus twice"):
            require_once(twice)


def test_a_stream_that_ends_between_two_batches_or_before_it_begins_is_named(tmp_path: Path) -> None:
    import pyarrow

    table = pyarrow.table({"text": TEXTS})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.slice(0, 500))
        end = sink.tell()
        writer.write_table(table.slice(500))
    (tmp_path / "a.arrow").write_bytes(sink.getvalue().to_pybytes()[:end])
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    for name in ("a.arrow", "a.jsonl.gz"):
        with pytest.raises(DataError, match=f"{name}: is cut short"):
            list(texts([tmp_path / name]))
