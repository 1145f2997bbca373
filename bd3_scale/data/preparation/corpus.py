"""Which files a corpus consists of, in one fixed order.

A source is a file, a folder, or a pattern; what exists is itself, whatever signs are in its name. A folder stands for everything below it;
one that the Hugging Face library `datasets` wrote (save_to_disk), for the .arrow files that its state.json lists: what `map` and `filter`
cached beside them is other text. Invariants: the order is that of the sources, then of the sorted names; nothing in a folder is passed over
in silence: what is of no kind that can be read is an error with its name, unless a pattern says that it is ignored; a source gives each
file once, whatever links lead to it.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from bd3_scale.data.preparation.compression import COMPRESSIONS
from bd3_scale.errors import DataError
from bd3_scale.files import expanded

JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".arrow")
_READ = f"{', '.join(JSON_LINES)} (an object a line) and .txt, each also as {', '.join(COMPRESSIONS)}; {', '.join(TABLES)}"
_NAMED = 50
"""The most names in an error."""


def kind_of(path: Path) -> str | None:
    """.jsonl (for all of JSON_LINES) | .txt | .parquet | .arrow by the name of a file, in any case; None: it cannot be read."""
    name = path.name.lower()
    for kind in TABLES:
        if name.endswith(kind):
            return kind
    name = next((name.removesuffix(one) for one in COMPRESSIONS if name.endswith(one)), name)
    return ".txt" if name.endswith(".txt") else ".jsonl" if name.endswith(JSON_LINES) else None


def corpus_files(sources: Sequence[str], ignore: Sequence[str] = ()) -> list[Path]:
    """The files that `sources` stand for, in the order of the corpus. `ignore`: patterns of names, or of paths below a named folder, that
    do not belong to it. Raises DataError for what cannot be read, or stands for nothing."""
    files: list[Path] = []
    for source in sources:
        path = expanded(source)
        found = _Found(ignore)
        pattern = glob.has_magic(str(path)) and not os.path.lexists(path)
        # The shortest way to a file is its name: `**` follows links in circles.
        named = sorted(map(Path, glob.glob(str(path), recursive=True)), key=lambda one: (len(one.parts), one)) if pattern else [path]
        try:
            for one in named:
                if pattern and found.ignored(one, one.parent):
                    continue
                if one.is_dir():
                    found.below(one, one)
                else:
                    found.file(one)
        except OSError as error:
            raise DataError(f"{error.filename or source}: cannot be read ({error.strerror}); make it readable or leave it out") from None
        if found.unread:
            raise DataError(_unread(source, found.unread))
        if not found.files:
            raise DataError(f"{source}: holds no file that can be read; give {_READ}")
        files += sorted(found.files) if pattern else found.files
    return files


def require_once(files: Iterable[Path]) -> None:
    """Raises DataError where a file would be read twice: its documents would be doubled, or held out and trained on."""
    seen: set[Path] = set()
    for path in files:
        if (real := path.resolve()) in seen:
            raise DataError(f"{path}: is in the corpus twice; name each file once, and what is held out not among the sources")
        seen.add(real)


def _unread(source: str, unread: Sequence[Path]) -> str:
    if len(unread) == 1 and unread[0] == expanded(source):
        return f"{source}: its kind is not known; give {_READ}"
    names = ", ".join(str(path) for path in unread[:_NAMED]) + (f" and {len(unread) - _NAMED} more" if len(unread) > _NAMED else "")
    return f"{source}: {names}: not of a kind that can be read; --ignore PATTERN leaves out what is no text of the corpus, or give {_READ}"


class _Found:
    """What one source stands for so far."""

    def __init__(self, ignore: Sequence[str]) -> None:
        self.ignore = ignore
        self.files: list[Path] = []
        self.unread: list[Path] = []
        self._seen: set[str] = set()

    def ignored(self, path: Path, root: Path) -> bool:
        return any(fnmatch(path.name, one) or fnmatch(str(path.relative_to(root)), one) for one in self.ignore)

    def file(self, path: Path) -> None:
        if not os.path.lexists(path):
            raise DataError(f"{path}: cannot be read (there is no such file); name the files, folders or patterns of the corpus")
        if self._first_time(path):
            (self.unread if kind_of(path) is None or not path.is_file() else self.files).append(path)

    def below(self, folder: Path, root: Path) -> None:
        """Everything in `folder`, sorted by name, level by level."""
        if not self._first_time(folder):
            return
        if (folder / "dataset_dict.json").is_file():
            splits = sorted(one.name for one in folder.iterdir() if (one / "state.json").is_file())
            raise DataError(f"{folder}: holds the splits {', '.join(splits)} of a data set; give one of them, such as {folder / 'train'}")
        saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
        names = _saved(folder) if saved else sorted(one.name for one in folder.iterdir())
        if saved:
            self.unread += [one for one in sorted(folder.iterdir()) if not _of_saved(one.name, names) and not self.ignored(one, root)]
        for path in (folder / name for name in names):
            if self.ignored(path, root):
                continue
            if path.is_dir():
                self.below(path, root)
            else:
                self.file(path)

    def _first_time(self, path: Path) -> bool:
        real = os.path.realpath(path)
        if real in self._seen:
            return False
        self._seen.add(real)
        return True


def _of_saved(name: str, data: Sequence[str]) -> bool:
    return name in data or name in ("state.json", "dataset_info.json") or fnmatch(name, "cache-*.arrow")


def _saved(folder: Path) -> list[str]:
    """What `datasets` says is the data of a folder that it saved."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_bytes())
        names = [one["filename"] for one in state["_data_files"]]
        plain = all(isinstance(name, str) and Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError):
        plain = False
    if not plain:
        raise DataError(f"{path}: is not the state of a data set as save_to_disk writes it; save it again, or name the .arrow files")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{path}: has a selection of rows, which is not read here; save the data set again with flatten_indices()")
    return names
