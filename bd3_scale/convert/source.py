"""Foreign weights as named tensors, read one at a time: safetensors files (one or sharded), or a torch file without its pickle.

Safetensors are read with `preadv`, as our own are, and their header is trusted in nothing. A torch file (`.ckpt`, `.pt`, `.bin`)
is opened with `weights_only=True` and memory-mapped: whatever needs more of pickle than tensors and plain containers is refused.
Invariants: names are unique; a file named by an index lies in the folder of the index; values come as fp32 on the host.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from bd3_scale.checkpoint.shard_files import LARGEST_HEADER, read_text
from bd3_scale.errors import CheckpointError, one_line

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LARGEST_JSON = 1 << 28
ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"


class Source(Protocol):
    """Tensors by name."""

    path: Path

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def require(self, names: Iterable[str]) -> None:
        """Raise CheckpointError for a tensor that `read` could not make numbers of."""

    def read(self, name: str) -> torch.Tensor:
        """fp32 on the host, in full shape. Raises CheckpointError."""


class SafetensorsFiles:
    """One safetensors file, or the shards that an index names; opened when they are read."""

    def __init__(self, files: list[Path]) -> None:
        self.path = files[0]
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
        for file in files:
            for name, entry in self._header(file):
                if name in self._entries:
                    raise CheckpointError(f"{file} holds {name}, which {self._entries[name][0].name} holds, too")
                self._entries[name] = (file, *entry)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape, _) in self._entries.items()}

    def require(self, names: Iterable[str]) -> None:
        for name in names:
            file, dtype, _, _ = self._entries[name]
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{file}: {name} is of type {dtype}, quantised or no weight; take the weights in {', '.join(DTYPES)} (of a quantised "
                    "model, those that it was made of)"
                )

    def read(self, name: str) -> torch.Tensor:
        file, dtype, shape, begin = self._entries[name]
        values = torch.empty(math.prod(shape), dtype=DTYPES[dtype])
        raw = values.view(torch.uint8).numpy()
        with _opened(file) as descriptor:
            _fill(descriptor, file, raw.data.cast("B"), begin)
        if sys.byteorder == "big":
            raw.reshape(-1, values.element_size())[:] = raw.reshape(-1, values.element_size())[:, ::-1].copy()
        return values.float().reshape(shape)

    def _header(self, file: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int]]]:
        with _opened(file) as descriptor:
            size = os.fstat(descriptor).st_size
            prefix = bytearray(8)
            _fill(descriptor, file, memoryview(prefix), 0)
            (length,) = struct.unpack("<Q", prefix)
            if length > min(LARGEST_HEADER, size - 8):
                raise CheckpointError(f"{file} is not a safetensors file")
            text = bytearray(length)
            _fill(descriptor, file, memoryview(text), 8)
        try:
            header = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{file} is not a safetensors file (its header is not JSON)") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{file} is not a safetensors file (its header is no mapping)")
        metadata = header.pop("__metadata__", {})
        if isinstance(metadata, dict):
            self.metadata.update({key: value for key, value in metadata.items() if isinstance(value, str)})
        for name, entry in header.items():
            yield name, self._entry(file, name, entry, 8 + length, size)

    @staticmethod
    def _entry(file: Path, name: str, entry: Any, start: int, size: int) -> tuple[str, tuple[int, ...], int]:
        """(dtype, shape, first byte), checked. A dtype that is no weight's is an error only where the tensor is used."""
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(number) is int and number >= 0 for number in (*shape, begin, end)) and start + end <= size
            if dtype in DTYPES:
                sound = sound and end - begin == math.prod(shape) * DTYPES[dtype].itemsize
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise CheckpointError(f"{file}: the entry of {name!r} is not that of a tensor inside the file")
        return dtype, shape, start + begin


class TorchFile:
    """The tensors of a file that torch.save wrote, opened without executing its pickle and mapped, not read.

    `content` is the whole document; the tensors are those of its `state_dict` where it has one (Lightning), else its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises what its unpickler, its zip reader and the file system raise
            why = one_line(error, 160)
            raise CheckpointError(
                f"{path} cannot be opened without executing its pickle ({why}); convert it where it is trusted: load it there and save "
                "its state_dict with safetensors"
            ) from None
        state = self.content.get("state_dict", self.content) if isinstance(self.content, dict) else None
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} holds no mapping of tensors")
        self._tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._tensors.items()}

    def require(self, names: Iterable[str]) -> None:
        pass

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().float()


def open_source(path: Path, config: dict[str, Any] | None = None) -> tuple[Source, dict[str, Any]]:
    """The weights at `path` (a Hugging Face directory, a safetensors or a torch file) and `config`, by default its config.json ({}
    for a file)."""
    if path.is_dir():
        if (path / ADAPTER).exists():
            raise CheckpointError(
                f"{path} holds an adapter (LoRA) beside or instead of whole weights; merge it where it was made (peft: "
                "`model.merge_and_unload().save_pretrained(FOLDER)`) and name that folder"
            )
        config = read_json(path / "config.json") if config is None else config
        # As transformers does: an index beside a single file is what is left of an earlier save.
        if (path / "model.safetensors").exists():
            return SafetensorsFiles([path / "model.safetensors"]), config
        if (path / INDEX).exists():
            return SafetensorsFiles(_shards(path)), config
        if (path / "pytorch_model.bin").exists():
            return TorchFile(path / "pytorch_model.bin"), config
        raise CheckpointError(f"{path} holds neither model.safetensors nor {INDEX} nor pytorch_model.bin; name a folder with weights")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; name a Hugging Face directory, a .safetensors or a .ckpt file")
    return (SafetensorsFiles([path]) if path.suffix == ".safetensors" else TorchFile(path)), config or {}


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON document. Raises CheckpointError."""
    try:
        document = json.loads(read_text(path.resolve(), LARGEST_JSON))  # the hub's cache is a folder of links
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not JSON") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON mapping")
    return document


def _shards(folder: Path) -> list[Path]:
    names = read_json(folder / INDEX).get("weight_map")
    files = sorted(set(names.values())) if isinstance(names, dict) and all(isinstance(name, str) for name in names.values()) else []
    if not files or any(Path(name).name != name or name in ("", ".", "..") for name in files):
        raise CheckpointError(f"{folder / INDEX} names files that do not lie beside it")
    return [folder / name for name in files]


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        with open(path, "rb", buffering=0) as file:
            yield file.fileno()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None


def _fill(descriptor: int, path: Path, buffer: memoryview, at: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], at + done)
        if count == 0:
            raise CheckpointError(f"{path} ends too early")
        done += count
