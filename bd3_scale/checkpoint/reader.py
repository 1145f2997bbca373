"""Opening a checkpoint and reading any region of any tensor from it: by training, evaluation, sampling and the tools.

Invariants: a `Checkpoint` that could be made has a sound index whose parts tile every tensor, and all its files in full
length; no element leaves a file whose SHA-256 was not compared with the index first; `load_into` touches live state only
after everything it will read was verified; whatever is wrong is a CheckpointError of one line that names the folder.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.index import INDEX_NAME, RECIPE_NAME, FileRecord, Index, Tensor, check_tiling, parse, part_key
from bd3_scale.checkpoint.region import Region, intersect, kind_order
from bd3_scale.checkpoint.shard_files import ShardReader, check_content, check_size, read_text
from bd3_scale.collective_errors import Communicator, Solo, together
from bd3_scale.errors import CheckpointError, one_line
from bd3_scale.files import raise_file_limit

STEP_NAME = re.compile(r"step_(\d{8,})")
"""A checkpoint folder; nothing else is ever taken for one."""
LARGEST_INDEX = 1 << 30
"""Bytes; some million parts."""
OPEN_FILES = 1024
"""Files kept open at most while many tensors are read: each of them may have a part of every tensor."""
HASHING_THREADS = 4


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest step first, whole or not."""
    try:
        found = [entry for entry in folder.iterdir() if STEP_NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed ({error.strerror}); make it a readable folder") from None
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def newest_whole(folder: Path, below: int | None = None) -> Path | None:
    """The newest checkpoint in `folder` (with a step < `below`) that opens: sound index, all files in full length."""
    for path in step_folders(folder):
        if below is None or int(path.name.removeprefix("step_")) < below:
            try:
                Checkpoint(path, offer=False)
            except CheckpointError:
                continue
            return path
    return None


def shares_of_files(files: Mapping[str, FileRecord], ranks: int) -> list[list[str]]:
    """The names for each rank, about the same number of bytes for all: largest first onto the rank with the least."""
    load, shares = [(0, rank) for rank in range(ranks)], list[list[str]]([] for _ in range(ranks))
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        held, rank = heapq.heappop(load)
        shares[rank].append(name)
        heapq.heappush(load, (held + files[name].bytes, rank))
    return shares


class Checkpoint:
    """A checkpoint folder, opened and checked but for the content of its data files (see `verify_files`).

    Raises CheckpointError where anything is missing, damaged or not as the index says. `offer`: let such errors name the
    newest older checkpoint beside it that is whole.
    """

    def __init__(self, path: str | Path, offer: bool = True) -> None:
        self.path = Path(path)
        self._offer = offer
        self._verified: set[str] = set()
        try:
            self._index = self._open()
        except CheckpointError as error:
            raise self._damaged(error) from None

    def _open(self) -> Index:
        if not self.path.is_dir():
            raise CheckpointError("there is no such folder")
        index = parse(read_text(self.path / INDEX_NAME, LARGEST_INDEX))
        for name, record in index.files.items():
            check_size(self.path / name, record)
        # Only now: the sizes of real files bound what the check of the parts has to hold in memory.
        check_tiling(index)
        named = re.match(r"step_(\d{8,})(?:\.|$)", self.path.name)
        if named and int(named[1]) != index.step:
            raise CheckpointError(f"its index is that of step {index.step}")
        return index

    def _damaged(self, error: CheckpointError) -> CheckpointError:
        """The error with the folder's name and, where there is one, the way out."""
        text = f"checkpoint {self.path}: {error}"
        named = STEP_NAME.fullmatch(self.path.name)
        if not (self._offer and named):
            return CheckpointError(text)
        older = newest_whole(self.path.parent, below=int(named[1]))
        if older is None:
            return CheckpointError(f"{text}; no older whole checkpoint stands beside it")
        return CheckpointError(
            f"{text}; the newest older whole one is {older.name}: write that name into {self.path.parent / 'latest'}, or train on with "
            "checkpoint.fallback=true"
        )

    @property
    def step(self) -> int:
        return self._index.step

    @property
    def samples_consumed(self) -> int:
        """Rows of training data used so far."""
        return self._index.samples_consumed

    @property
    def run(self) -> dict[str, Any]:
        """The free-form entries of the run that was saved: tuned interval and its history, wandb id ..."""
        return self._index.run

    @property
    def versions(self) -> dict[str, str]:
        """Package -> version at the time of saving."""
        return self._index.versions

    @property
    def index(self) -> Index:
        """All that index.json says."""
        return self._index

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is held, in the order in which it was written: weight, the optimizer's states by name, ema."""
        return tuple(sorted(self._index.tensors, key=kind_order))

    @property
    def recipe(self) -> str:
        """The resolved recipe, YAML text."""
        self.verify_files([RECIPE_NAME])
        try:
            return read_text(self.path / RECIPE_NAME, self._index.files[RECIPE_NAME].bytes).decode("utf-8")
        except (CheckpointError, UnicodeDecodeError) as error:
            raise CheckpointError(f"checkpoint {self.path}: {RECIPE_NAME} cannot be read ({one_line(error)})") from None

    @property
    def parameter_count(self) -> int:
        """Elements of all weights."""
        return sum(Region.whole(shape).numel for shape in self.shapes("weight").values())

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of the full tensor, for one kind; empty where the kind is not held."""
        return {name: tensor.shape for name, tensor in self._index.tensors.get(kind, {}).items()}

    def verify_files(self, which: Iterable[str] | None = None, communicator: Communicator | None = None) -> None:
        """Compare size and SHA-256 of files (default: all) with the index; collective, the ranks divide the bytes among them.

        Files that were verified by this object are not read again. Raises the same CheckpointError on every rank.
        """
        communicator = communicator or Solo()
        names = sorted(self._index.files if which is None else set(which))
        unknown = [name for name in names if name not in self._index.files]
        if unknown:
            raise CheckpointError(f"checkpoint {self.path} has no file {unknown[0]!r}; it has {', '.join(sorted(self._index.files))}")
        # What is to do must not depend on what one rank has verified before, or the ranks would divide different lists.
        shares = shares_of_files({name: self._index.files[name] for name in names}, communicator.world_size)
        mine = [name for name in shares[communicator.rank] if name not in self._verified]

        def verify() -> None:
            with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing and reading release the interpreter
                for _ in pool.map(lambda name: check_content(self.path / name, self._index.files[name]), mine):
                    pass

        try:
            together(communicator, verify, str)
        except CheckpointError as error:
            raise self._damaged(error) from None
        self._verified.update(names)

    def read(self, kind: str, name: str, region: Region | None = None) -> torch.Tensor:
        """One tensor, fp32 on the host: in full shape, or 1-D the elements of `region`. Reads only the bytes it needs,
        and, once, the files they lie in to verify them. Raises CheckpointError."""
        tensor = self._tensor(kind, name)
        asked = region or Region.whole(tensor.shape)
        if asked.shape != tensor.shape:
            raise CheckpointError(f"checkpoint of another model: {kind} of {name} is {list(asked.shape)} here, {list(tensor.shape)} there")
        with _OpenShards(self) as shards:
            values = shards.gather(kind, name, asked)
        return values.reshape(tensor.shape) if region is None else values

    def weights(self, kind: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(canonical name, full fp32 tensor on the host), one at a time, sorted by name: of `kind`, by default the averaged
        weights ("ema") where they are held, else "weight"."""
        kind = kind or ("ema" if "ema" in self._index.tensors else "weight")
        if kind not in self._index.tensors:
            raise CheckpointError(f"checkpoint {self.path} has no {kind}; it has {', '.join(self.kinds)}")
        with _OpenShards(self) as shards:
            for name, shape in sorted(self.shapes(kind).items()):
                yield name, shards.gather(kind, name, Region.whole(shape)).reshape(shape)

    def load_into(self, fragments: Sequence[Fragment], communicator: Communicator | None = None) -> None:
        """Fill the live values of this rank's `fragments` in place; collective, and any layout can load any other's.

        Compared is the union of the fragments of all ranks: for every kind they ask for, the names and shapes must be those
        saved, no more and no fewer. Kinds that no rank asks for are not read (weights alone can be taken from a full state).
        Raises the same CheckpointError on every rank, before any value is touched unless a file fails while it is read.
        """
        communicator = communicator or Solo()

        def asked() -> dict[tuple[str, str], tuple[int, ...]]:
            return {(fragment.kind, fragment.name): fragment.region.shape for fragment in fragments}

        union: dict[tuple[str, str], tuple[int, ...]] = {}
        for shapes in together(communicator, asked, str):
            union.update(shapes)
        self._compare(union)
        kinds = {kind for kind, _ in union}
        tables = {id(tensor.parts): tensor.parts for kind in kinds for tensor in self._index.tensors[kind].values()}
        needed = {file for parts in tables.values() for file in parts.files}
        self.verify_files(needed, communicator)

        def load() -> None:
            with _OpenShards(self) as shards:
                for fragment in sorted(fragments, key=lambda fragment: fragment.order):
                    shards.fill(fragment)

        try:
            together(communicator, load, lambda error: f"loading failed on a rank: {type(error).__name__}: {error}")
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {self.path}: {error}") from error.__cause__

    def _compare(self, asked: dict[tuple[str, str], tuple[int, ...]]) -> None:
        """Raise CheckpointError with the first difference in names or shapes between what is asked for and what is held."""
        for kind in sorted({kind for kind, _ in asked}, key=kind_order):
            held = self.shapes(kind)
            wanted = {name: shape for (asked_kind, name), shape in asked.items() if asked_kind == kind}
            for name in sorted(held.keys() | wanted.keys()):
                if held.get(name) != wanted.get(name):
                    here = f"is {list(wanted[name])}" if name in wanted else "does not exist"
                    there = f"{list(held[name])}" if name in held else "missing"
                    raise CheckpointError(
                        f"checkpoint of another model: {kind} of {name} {here} in this model but is {there} in {self.path}; "
                        "set the model's recipe as saved in its recipe.yaml"
                    )

    def _expected(self, file: str) -> dict[str, int]:
        """Part key -> elements, of all that a file must hold."""
        return {
            part_key(kind, name, region): region.numel
            for kind, names in self._index.tensors.items()
            for name, tensor in names.items()
            for region in tensor.parts.in_file(file)
        }

    def _tensor(self, kind: str, name: str) -> Tensor:
        tensor = self._index.tensors.get(kind, {}).get(name)
        if tensor is None:
            raise CheckpointError(f"checkpoint {self.path} has no {kind} of {name}; bd3 inspect lists what it has")
        return tensor


class _OpenShards:
    """The files of a checkpoint while they are read: verified before the first read, OPEN_FILES open at most, all closed at the end."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._open: dict[str, ShardReader] = {}
        self._at_once = min(OPEN_FILES, raise_file_limit() // 4)

    def __enter__(self) -> _OpenShards:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._open.values():
            reader.close()
        self._open.clear()

    def _reader(self, file: str) -> ShardReader:
        if file not in self._checkpoint._verified:
            self._checkpoint.verify_files([file])
        reader = self._open.pop(file, None)
        if reader is None:
            if len(self._open) >= self._at_once:
                self._open.pop(next(iter(self._open))).close()  # the one not used for the longest time
            reader = ShardReader(self._checkpoint.path / file, self._checkpoint._expected(file))
        self._open[file] = reader
        return reader

    def gather(self, kind: str, name: str, region: Region) -> torch.Tensor:
        """The elements of `region`, 1-D fp32 on the host."""
        values = torch.empty(region.numel, dtype=torch.float32)
        self._read(kind, name, region, values)
        return values

    def fill(self, fragment: Fragment) -> None:
        """Fill a live value: straight into it where it is plain host memory, by way of the host otherwise."""
        value = fragment.value.detach()
        if value.device.type == "cpu" and value.is_contiguous():
            self._read(fragment.kind, fragment.name, fragment.region, value)
        else:
            value.copy_(self.gather(fragment.kind, fragment.name, fragment.region))

    def _read(self, kind: str, name: str, region: Region, target: torch.Tensor) -> None:
        for part in self._checkpoint._tensor(kind, name).parts.meeting(region):
            pieces = intersect(part.region, region)
            if len(pieces.length):
                self._reader(part.file).read(part_key(kind, name, part.region), pieces, target)
