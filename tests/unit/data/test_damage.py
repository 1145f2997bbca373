"""Whatever is done to a file of a data folder, before or during a run: an error that names it, or a repaired copy. Never silence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bd3_scale.data.loader import Loader
from bd3_scale.data.manifest import MANIFEST, Manifest
from bd3_scale.data.open import Data, open_data
from bd3_scale.data.order import GlobalOrder
from bd3_scale.errors import DataError
from bd3_scale.recipe.schema import DataConfig

CONTEXT = 64
FORMATS = ("mds", "webdataset")
TRIALS = 250
"""Of each format, with a remote and without one."""


def opened(folder: Path, kind: str, remote: Path | None = None) -> Data:
    config = DataConfig(path=str(folder), format=kind, tokenizer="bytes", window=2, remote=None if remote is None else str(remote))
    return open_data(config, CONTEXT, leader=True, barrier=lambda: None)


def all_rows(data: Data) -> np.ndarray:
    with data:
        return np.concatenate([reader.rows(np.arange(len(reader))) for reader in (data.train, data.validation)])


def damage(path: Path, files: list[Path], generator: np.random.Generator, kind: str) -> str:
    """Change the file at `path` in one of many ways; how, in words."""
    content = path.read_bytes()
    if kind == "byte":
        place, other = int(generator.integers(len(content))), int(generator.integers(1, 256))
        path.write_bytes(content[:place] + bytes([content[place] ^ other]) + content[place + 1 :])
        return f"byte {place} changed by {other}"
    if kind == "cut":
        length = int(generator.integers(len(content)))
        path.write_bytes(content[:length])
        return f"cut to {length}"
    if kind == "longer":
        path.write_bytes(content + generator.bytes(int(generator.integers(1, 9))))
        return "made longer"
    if kind == "swapped":
        others = [file for file in files if file.suffix == path.suffix and file.read_bytes() != content]
        if others:
            other_file = others[int(generator.integers(len(others)))]
            path.write_bytes(other_file.read_bytes())
            return f"replaced by {other_file}"
    path.unlink()
    return "deleted"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("with_remote", [False, True])
def test_no_damage_is_silent(kind: str, with_remote: bool, prepared: dict[str, tuple[Path, Manifest]], tmp_path: Path) -> None:
    """Single bytes in 250 trials of 300; the other 50 are files that were cut, prolonged, swapped with another or deleted."""
    good = prepared[kind][0]
    folder = Path(shutil.copytree(good, tmp_path / "data"))
    expected = all_rows(opened(folder, kind))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    generator = np.random.default_rng([7, with_remote])
    for trial in range(TRIALS + 50):
        path = files[trial % len(files)]
        how = damage(path, files, generator, "byte" if trial < TRIALS else ("cut", "longer", "swapped", "deleted")[trial % 4])
        where = (path, how)
        if with_remote:
            assert (all_rows(opened(folder, kind, good)) == expected).all(), where
            assert path.read_bytes() == (good / path.relative_to(folder)).read_bytes(), where
        else:
            with pytest.raises(DataError) as error:
                all_rows(opened(folder, kind))
            # A manifest that is swapped for an index is said to be damaged; one that is gone, to be missing: by its name either way.
            assert path.name in str(error.value) and str(path.parent) in str(error.value) and "\n" not in str(error.value), where
            shutil.copyfile(good / path.relative_to(folder), path)
    assert (all_rows(opened(folder, kind)) == expected).all()
    assert sorted(file for file in folder.rglob("*") if file.is_file()) == files, "something was left behind"


def run(data: Data, steps: range) -> list[list[int]]:
    with Loader(data.train, data.order(3), global_batch=16, micro_batch=16, replica=0, replicas=1, prefetch=0) as loader:
        return [loader.micro_batches(16 * step)[0].rows.ravel().tolist() for step in steps]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("change", ["in place", "one bit, with the old time", "cut in place", "replaced", "removed"])
def test_a_shard_that_is_touched_while_training_runs(
    kind: str, change: str, prepared: dict[str, tuple[Path, Manifest]], copy_of: Callable[..., Path], tmp_path: Path
) -> None:
    """The steps before the change have opened the shard. Its rows stay right (through the open file), or the error names it."""
    good, folder = prepared[kind][0], copy_of(kind)
    shards = Manifest.load(folder / MANIFEST).train.shards
    order = GlobalOrder([shard.rows for shard in shards], 3, 2)
    victim = order.shards(0, 1, 0)[0][0]
    path = folder / "train" / shards[victim].file
    with opened(good, kind) as untouched:
        expected = run(untouched, range(8))
    for remote in (None, good):
        shutil.copyfile(good / path.relative_to(folder), path)
        status, content = path.stat(), path.read_bytes()
        with opened(folder, kind, remote) as data:
            assert run(data, range(1)) == expected[:1]
            if change == "in place":
                with open(path, "r+b") as file:
                    file.write(bytes(len(content)))
            elif change == "one bit, with the old time":
                with open(path, "r+b") as file:  # every byte of rows, one bit each: whichever row comes next is hit
                    file.write(bytes(byte ^ 1 for byte in content))
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            elif change == "cut in place":
                os.truncate(path, 100)
            elif change == "replaced":
                path.unlink()
                path.write_bytes(bytes(len(content)))
            else:
                path.unlink()
            if remote is not None or change in ("replaced", "removed"):
                assert run(data, range(8)) == expected
            else:
                with pytest.raises(DataError, match=path.name):
                    run(data, range(8))
        if remote is None:
            with pytest.raises(DataError, match=path.name), opened(folder, kind) as later:
                run(later, range(8))
