"""Small data folders of random bytes for the tests of this folder: several shards per split, both formats."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bd3_scale.data.manifest import Manifest
from bd3_scale.data.preparation.packing import Document
from bd3_scale.data.preparation.prepare import Packing, prepare
from bd3_scale.data.tokenizer import ByteTokenizer

CONTEXT = 64


def random_documents(count: int = 400, seed: int = 0) -> Iterator[Document]:
    """Documents of 0 to 199 random bytes, a fifth of them held out."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        yield Document(f"d{number}", generator.integers(0, 256, generator.integers(0, 200)), number % 5 == 0)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Manifest]]:
    """Format -> (folder, manifest). Not to be changed: copy it."""
    root = tmp_path_factory.mktemp("prepared")
    made = {}
    for kind in ("mds", "webdataset"):
        packing = Packing(ByteTokenizer(), CONTEXT, "bos", kind, shard_bytes=12_500)
        made[kind] = root / kind, prepare(root / kind, packing, "random", None, random_documents)
    return made


@pytest.fixture
def copy_of(prepared: dict[str, tuple[Path, Manifest]], tmp_path: Path) -> Callable[..., Path]:
    """A private copy of the prepared folder of a format."""

    def copy(kind: str, name: str = "data") -> Path:
        return Path(shutil.copytree(prepared[kind][0], tmp_path / name))

    return copy
