"""Where the rows of a column of token ids stand in a shard that another program wrote: MDS, tar (webdataset) or Arrow (`datasets`).

All three keep the ids of a row as plain numbers, one after another, so that a row can be read where it stands, by its first byte; nothing
is decoded, and nothing is unpickled. Invariants: `Column` says where every row of the shard stands, in order; numbers are little-endian;
what is no column of plain whole numbers is a DataError that names the file, the column and what there is.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bd3_scale.errors import DataError

USUAL = ("tokens", "input_ids", "tokens.npy", "input_ids.npy", "npy")
"""Columns that are taken for ids where none is named."""


@dataclass(frozen=True)
class Column:
    """A column of a shard, a row of ids each."""

    dtype: np.dtype[Any] | None
    """None where the shard does not say it (bytes)."""
    offsets: np.ndarray
    """int64 [rows]: the first byte of each row."""
    sizes: np.ndarray
    """int64 [rows]: bytes of each row."""


def chosen(path: Path, there: Sequence[str], asked: str | None) -> str:
    """The column of ids among those that are there. Raises DataError."""
    if asked is not None and asked in there:
        return asked
    usual = [name for name in USUAL if name in there]
    if asked is not None or not usual:
        wanted = "of token ids" if asked is None else f"called {asked}"
        raise DataError(f"{path}: has no column {wanted}, only {', '.join(there) or 'none'}; name it with --column, or prepare the text")
    return usual[0]


def mds_names(content: bytes, path: Path) -> list[str]:
    """Columns of an MDS shard."""
    return list(_mds_config(content, path)["column_names"])


def mds_column(content: bytes, path: Path, name: str) -> Column:
    """Of an MDS shard: a table of samples; a sample is the sizes of its columns of no fixed size, and the columns."""
    config = _mds_config(content, path)
    count = int(np.frombuffer(content, "<u4", 1)[0])
    table = np.frombuffer(content, "<u4", count + 1, 4).astype(np.int64)
    fixed, place = config["column_sizes"], table[:-1].copy()
    sizes = []
    for size in fixed:
        sizes.append(np.full(count, size, np.int64) if size else _numbers(content, place, "<u4"))
        place += 0 if size else 4
    number = config["column_names"].index(name)
    place += np.sum(sizes[:number], axis=0, dtype=np.int64)
    kind, *rest = config["column_encodings"][number].split(":")
    if kind == "bytes":
        return Column(None, place, sizes[number])
    if kind != "ndarray":
        raise DataError(f"{path}: its column {name} is {kind}, no row of numbers; name another with --column, or prepare the text")
    dtype: str = rest[0] if rest else ""
    header = np.zeros(count, np.int64)
    if not rest:  # the type stands before the numbers
        from bd3_scale.data.formats.streaming_compat import import_streaming

        kinds = set(_numbers(content, place, "u1").tolist())
        names = import_streaming("streaming.base.format.mds.encodings").NDArray._int2value_dtype
        dtype = " and ".join(sorted(str(names.get(one)) for one in kinds))
        header += 1
    if len(rest) < 2:  # and the shape
        shape = _numbers(content, place + header, "u1")
        if (wrong := np.flatnonzero(shape >> 2 != 1)).size:
            raise DataError(f"{path}: row {wrong[0]} of its column {name} has {shape[wrong[0]] >> 2} dimensions, needed is 1; {_WRITE}")
        header += 1 + (1 << shape % 4)
    return Column(_whole_numbers(dtype, path, name), place + header, sizes[number] - header)


_WRITE = "write the folder again, or prepare the text"


def tar_names(content: bytes, path: Path) -> list[str]:
    """What members of a tar shard are called behind their keys."""
    return sorted({_extension(member.name) for member in _members(content, path)})


def tar_column(content: bytes, path: Path, name: str) -> Column:
    """Of a tar shard: arrays in the format of numpy, of a row or of several."""
    dtypes, offsets, sizes = set(), list[int](), list[int]()
    for member in _members(content, path):
        if _extension(member.name) != name:
            continue
        array = io.BytesIO(content[member.offset_data : member.offset_data + member.size])
        try:
            version = np.lib.format.read_magic(array)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(array)
        except ValueError:
            raise DataError(f"{path}: {member.name} is no array of numpy; name another --column, or prepare the text") from None
        rows = shape[0] if len(shape) == 2 else 1
        size = int(np.prod(shape)) * dtype.itemsize
        if not 1 <= len(shape) <= 2 or (fortran and len(shape) == 2) or array.tell() + size != member.size:
            raise DataError(f"{path}: {member.name} is {dtype}{list(shape)}, needed are rows of ids, one after another; {_WRITE}")
        dtypes.add(dtype.str)
        offsets += (member.offset_data + array.tell() + number * (size // rows) for number in range(rows))
        sizes += [size // rows] * rows
    dtype_name = " and ".join(sorted(dtypes))
    return Column(_whole_numbers(dtype_name, path, name), np.array(offsets, np.int64), np.array(sizes, np.int64))


def arrow_names(content: bytes, path: Path) -> list[str]:
    """Columns of an Arrow file."""
    return list(_batches(content, path)[1].schema.names)


def arrow_column(content: bytes, path: Path, name: str) -> Column:
    """Of an Arrow file: lists of numbers, whose values stand in the buffers of its batches."""
    import pyarrow

    whole, reader = _batches(content, path)
    kind = reader.schema.field(name).type
    lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
    if not lists or not pyarrow.types.is_integer(kind.value_type):
        raise DataError(
            f"{path}: its column {name} is {kind}, needed are lists of whole numbers; name another --column, or prepare the text"
        )
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    offsets, sizes, before = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for batch in _all(reader, path):
        column, count = batch.column(batch.schema.names.index(name)), batch.num_rows
        values = column.values
        if column.null_count or values.null_count:
            raise DataError(f"{path}: a row from {before} to {before + count - 1} of its column {name} is null; {_WRITE}")
        if pyarrow.types.is_fixed_size_list(kind):
            ends = (column.offset + np.arange(count + 1, dtype=np.int64)) * kind.list_size
        else:
            ends = column.offsets.to_numpy().astype(np.int64)
        if count:
            buffer = values.buffers()[1]
            first = 0 if buffer is None else buffer.address - whole.address
            if not 0 <= first <= len(content):
                raise DataError(f"{path}: its batches are compressed, and rows are read where they stand; {_WRITE}")
            offsets.append(first + (values.offset + ends[:-1]) * dtype.itemsize)
            sizes.append(np.diff(ends) * dtype.itemsize)
        before += count
    return Column(_whole_numbers(dtype.name, path, name), np.concatenate(offsets), np.concatenate(sizes))


NAMES: dict[str, Callable[[bytes, Path], list[str]]] = {"mds": mds_names, "webdataset": tar_names, "arrow": arrow_names}
COLUMNS: dict[str, Callable[[bytes, Path, str], Column]] = {"mds": mds_column, "webdataset": tar_column, "arrow": arrow_column}
"""Kind of shard -> what is in its content; called with the path for messages."""


def _whole_numbers(name: str, path: Path, column: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(name)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "iu" or dtype.byteorder == ">":
        raise DataError(f"{path}: its column {column} holds {name or 'nothing'}, needed are whole numbers of one type; {_WRITE}")
    return dtype


def _numbers(content: bytes, places: np.ndarray, dtype: str) -> np.ndarray:
    """One number at each byte of `places`: int64."""
    width = np.dtype(dtype).itemsize
    around = np.frombuffer(content, np.uint8)[places[:, None] + np.arange(width)]
    return around.reshape(-1, width).copy().view(dtype)[:, 0].astype(np.int64)


def _mds_config(content: bytes, path: Path) -> dict[str, Any]:
    try:
        count = int(np.frombuffer(content, "<u4", 1)[0])
        table = np.frombuffer(content, "<u4", count + 1, 4)
        config: dict[str, Any] = json.loads(content[4 * (count + 2) : table[0]])
        if config["format"] != "mds" or table[-1] != len(content) or (np.diff(table.astype(np.int64)) < 0).any():
            raise ValueError
        if not len(config["column_names"]) == len(config["column_encodings"]) == len(config["column_sizes"]):
            raise ValueError
    except (ValueError, KeyError, TypeError, IndexError):
        raise DataError(f"{path}: is no whole MDS shard; restore it") from None
    return config


def _members(content: bytes, path: Path) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            return [member for member in archive.getmembers() if member.isfile()]
    except tarfile.TarError as error:
        raise DataError(f"{path}: is no whole, uncompressed tar file ({error}); restore it") from None


def _extension(member: str) -> str:
    return member.rpartition("/")[2].partition(".")[2]


def _batches(content: bytes, path: Path) -> tuple[Any, Any]:
    import pyarrow

    whole = pyarrow.py_buffer(content)
    try:
        ipc = pyarrow.ipc
        return whole, ipc.open_file(whole) if content[:6] == b"ARROW1" else ipc.open_stream(whole)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is no Arrow file ({error}); restore it") from None


def _all(reader: Any, path: Path) -> list[Any]:
    import pyarrow

    try:
        if hasattr(reader, "num_record_batches"):
            return [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return list(reader)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is no whole Arrow file ({error}); restore it") from None
