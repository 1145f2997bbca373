"""Files as C4, Dolma, Pushshift, text8, Notepad and the Hugging Face hub make them: read, or named in one line; nothing is passed over."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bd3_scale.data.manifest import Manifest
from bd3_scale.data.preparation.corpus import corpus_files
from bd3_scale.data.preparation.records import texts
from tests.unit.data.preparation.test_prepare_tool import run

MARK = b"\xef\xbb\xbf"


def lines(*documents: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def long_window(content: bytes) -> bytes:
    """As `zstd --long=31` writes a pipe: the window is in the header, the size is not."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False, hash_log=10, chain_log=10)
    maker = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return maker.compress(content) + maker.flush()


def skippable(content: bytes) -> bytes:
    """As pzstd writes it."""
    return b"\x50\x2a\x4d\x18\x04\x00\x00\x00\x01\x02\x03\x04" + zstandard.compress(content)


READ: dict[str, tuple[str, bytes, list[str]]] = {
    "C4": ("c4-train.00000-of-01024.json.gz", gzip.compress(lines("a", "b")), ["a", "b"]),
    "ndjson": ("a.ndjson", lines("a", "b"), ["a", "b"]),
    "bz2 of two members": ("a.jsonl.bz2", bz2.compress(lines("a")) + bz2.compress(lines("b")), ["a", "b"]),
    "xz with padding": ("RC_2015-01.xz.JSONL.XZ", lzma.compress(lines("a")) + bytes(8) + lzma.compress(lines("b")), ["a", "b"]),
    "upper case": ("BOOK.TXT", b"a\n\nb\n", ["a", "b"]),
    "marked": ("a.jsonl", MARK + lines("a", "b"), ["a", "b"]),
    "marked parts joined": ("a.jsonl", MARK + lines("a") + MARK + lines("b"), ["a", "b"]),
    "marked text": ("a.txt", MARK + b"a\r\n\r\nb\r\n" + MARK + b"c", ["a", "b\r\nc"]),
    "marked members": ("a.txt.gz", b"".join(gzip.compress(MARK + text) for text in (b"a", b"b", b"", b"\n\nc")), ["ab", "c"]),
    "blank lines": ("a.jsonl", b"\n" + lines("a") + b"  \r\n" + lines("b") + b"\n\n", ["a", "b"]),
    "gzip with zeros behind": ("a.jsonl.gz", gzip.compress(lines("a", "b")) + bytes(3 << 20), ["a", "b"]),
    "zeros between members": ("a.jsonl.gz", gzip.compress(lines("a")) + bytes(512) + gzip.compress(lines("b")), ["a", "b"]),
    "zstd --long=31": ("RS_2015-01.jsonl.zst", long_window(lines("a", "b")), ["a", "b"]),
    "pzstd": ("a.jsonl.zst", skippable(lines("a")) + skippable(lines("b")), ["a", "b"]),
    "a long number": ("a.jsonl", b'{"id": ' + b"7" * 5000 + b', "text": "a"}\n', ["a"]),
    "a name that looks like a pattern": ("a[1].jsonl", lines("a"), ["a"]),
}


@pytest.mark.parametrize("case", READ)
def test_what_others_read_is_read(case: str, tmp_path: Path) -> None:
    name, content, wanted = READ[case]
    (tmp_path / name).write_bytes(content)
    assert [text for text, _ in texts(corpus_files([str(tmp_path / name)]))] == wanted
    assert [text for text, _ in texts(corpus_files([str(tmp_path)]))] == wanted


def test_nothing_in_a_folder_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "corpus"
    (source / "deep").mkdir(parents=True)
    (source / "c4.json.gz").write_bytes(gzip.compress(lines("one text")))
    (source / "deep" / "extra.jsonl").write_bytes(lines("another text"))
    for name in ("README.md", "deep/part.csv", ".gitattributes"):
        (source / name).write_text("x")
    command = ["--source", source, "--path", tmp_path / "out", "--context", 4, "--tokenizer", "bytes", "--validation", "last:1"]
    assert run(*command) == 1
    error = capsys.readouterr().err
    assert all(name in error for name in ("README.md", "deep/part.csv", ".gitattributes", "--ignore")) and error.count("\n") == 1
    assert run(*command, "--ignore", "*.md", "deep/*.csv") == 1
    error = capsys.readouterr().err
    assert ".gitattributes" in error and "README.md" not in error and "part.csv" not in error
    assert run(*command, "--ignore", "*.md", "*.csv", ".*", "--json") == 0
    assert json.loads(capsys.readouterr().out)["train"]["documents"] == 1


def test_each_file_is_read_once(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "a.jsonl").write_bytes(lines("a"))
    (source / "itself").symlink_to(source)
    (source / "z.jsonl").symlink_to(source / "a.jsonl")
    for named in (source, source / "**" / "*.jsonl", tmp_path / "*"):
        assert [text for text, _ in texts(corpus_files([str(named)]))] == ["a"]


def bad_utf8(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    raw = pyarrow.array([b"a", b"b", b"c\xff", b"d"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2])
    parquet.write_table(pyarrow.table({"text": text}), path, row_group_size=2)


def columns(*names: str, values: tuple[object, ...] = ("a", "b", "c")) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.Table.from_arrays([pyarrow.array(values)] * len(names), names=list(names))
        parquet.write_table(table, path, row_group_size=2)

    return write


REFUSED: dict[str, tuple[str, bytes | Callable[[Path], None], str]] = {
    "a null": ("a.jsonl", lines("a") + b'{"text": null}\n', "a.jsonl: line 2 is not an object with a string"),
    "zeros after a crash": ("a.jsonl", lines("a", "b") + bytes(4096), "a.jsonl: line 3 "),
    "zeros in text": ("a.txt", b"a\n\nb\n" + bytes(4096), "a.txt: line 4 "),
    "a key twice": ("a.jsonl", b'{"text": "a", "text": "b"}\n', 'a.jsonl: line 1 has the key "text" twice'),
    "deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "a.jsonl: line 1 "),
    "an array": ("a.json", b'[{"text": "a"},\n{"text": "b"}]', "a.json: is a JSON array"),
    "UTF-16": ("a.txt", "a\n\nb".encode("utf-16"), "a.txt: line 1 is not UTF-8"),
    "UTF-16 in lines": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl: line 1 is not UTF-8"),
    "an empty archive": ("a.jsonl.xz", b"", "a.jsonl.xz: is cut short"),
    "a damaged archive": ("a.jsonl.bz2", bz2.compress(lines("a"))[:-5] + b"12345", "a.jsonl.bz2: is "),
    "invalid UTF-8 in a table": ("a.parquet", bad_utf8, "a.parquet: row 1 of row group 2 is not UTF-8"),
    "a null in a table": ("a.parquet", columns("text", values=("a", "b", "c", None)), "a.parquet: row 2 of row group 2 has no text"),
    "two columns of one name": ("a.parquet", columns("text", "text"), "a.parquet: has 2 columns 'text'"),
    "nested": ("a.parquet", columns("text", values=({"en": "a"}, {"en": "b"})), "column 'text' is struct<en: string>"),
    "numbers": ("a.parquet", columns("text", values=(1, 2)), "column 'text' is int64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named_in_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, message = REFUSED[case]
    content(tmp_path / name) if callable(content) else (tmp_path / name).write_bytes(content)
    command = ["--source", tmp_path / name, "--path", tmp_path / "out", "--context", 2, "--tokenizer", "bytes", "--row-special", "none"]
    assert run(*command, "--validation", "last:1") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


SKIPPABLE = ["a null", "zeros after a crash", "zeros in text", "a null in a table", "invalid UTF-8 in a table"]


@pytest.mark.parametrize("case", SKIPPABLE)
def test_bad_records_are_left_out_up_to_a_number_and_listed(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, _ = REFUSED[case]
    (tmp_path / "z.jsonl").write_bytes(lines("y", "z"))
    content(tmp_path / name) if callable(content) else (tmp_path / name).write_bytes(content)
    command = ["--source", tmp_path / name, tmp_path / "z.jsonl", "--context", 2, "--tokenizer", "bytes", "--row-special", "none"]
    command += ["--validation", "last:1"]
    assert run(*command, "--path", tmp_path / "out", "--skip-bad", 1) == 0
    assert "1 bad record" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "out" / "manifest.json")
    (left_out,) = manifest.left_out
    assert left_out.startswith(f"{name}: ") and manifest.validation.documents == 1
    (tmp_path / "z.jsonl").write_bytes(lines("y", "z") + b"{}\n")
    assert run(*command, "--path", tmp_path / "more", "--skip-bad", 1) == 1
    assert "z.jsonl: line 3" in capsys.readouterr().err


def test_what_is_wrong_is_found_before_the_first_document_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bd3_scale.data.preparation import tokenization

    monkeypatch.setattr(tokenization, "CHUNK_BYTES", 1)
    monkeypatch.setattr(tokenization, "make_chunk", lambda job: pytest.fail("the work has begun"))
    (tmp_path / "a.jsonl").write_bytes(lines("a", "b"))
    columns("words")(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl.gz").write_bytes(b"<html>404</html>")
    for name in ("b.parquet", "c.jsonl.gz"):
        sources = [tmp_path / "a.jsonl", tmp_path / name]
        assert run("--source", *sources, "--path", tmp_path / "out", "--context", 4, "--tokenizer", "bytes") == 1


def test_a_document_of_many_chunks_is_the_same_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of text8 is cut between words for the work, and is one document."""
    from bd3_scale.data.preparation import tokenization

    monkeypatch.setattr(tokenization, "CHUNK_BYTES", 1000)
    words = " ".join(f"w{number}" for number in range(3000))
    (tmp_path / "a.txt").write_text(f"{words}\n\na short one of one row\n\n{words[:5000]}\n\n{words[-400:]}")

    def prepared(name: str, *options: object) -> Manifest:
        command = ["--source", tmp_path / "a.txt", "--path", tmp_path / name, "--context", 16, "--tokenizer", "bytes", *options]
        assert run(*command, "--row-special", "none") == 0
        return Manifest.load(tmp_path / name / "manifest.json")

    def documents(made: Manifest) -> tuple[int, int]:
        return made.train.documents, made.validation.documents

    rules = [["--validation", rule] for rule in ("last:1", "last:2", 0.5)] + [["--packing", "document", "--validation", "last:2"]]
    parts = [prepared(f"parts{number}", *rule) for number, rule in enumerate(rules)]
    some = prepared("some", "--validation", "last:1", "--tokens", parts[1].train.tokens + 1000)  # the third document is not whole in it
    assert documents(some) == (1, 1) and [documents(made) for made in parts] == [(3, 1), (2, 2), (2, 2), (2, 2)]
    monkeypatch.setattr(tokenization, "CHUNK_BYTES", 1 << 20)
    for number, rule in enumerate(rules):
        assert prepared(f"whole{number}", *rule) == parts[number]


def test_a_line_that_is_too_long_for_the_memory_is_named_with_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("a" * 5000, "b"))
    (tmp_path / "b.txt").write_bytes(b"a line\n" * 1000)
    for name in ("a.jsonl", "b.txt"):
        command = [
            "--source",
            tmp_path / name,
            "--path",
            tmp_path / name[0],
            "--context",
            2,
            "--tokenizer",
            "bytes",
            "--validation",
            "last:1",
        ]
        assert run(*command, "--longest", 4000) == 1
        error = capsys.readouterr().err
        assert name in error and "longer than 4000 bytes" in error and "--longest" in error
