"""A safetensors reader that trusts nothing and streams: header checked against the real file, tensors memory-mapped.

Format (safetensors README): u64 little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}},
then the data; offsets are relative to the end of the header, contiguous, without holes or overlap.
"""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.grid.narrow import BFLOAT16
from qalora_export.safety.limits import MAX_HEADER_BYTES, parse_json
from qalora_export.safety.regular import regular_file

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: begin is an absolute file offset in bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Validate the whole header against the file size. Raises UnsafeInputError when anything is off."""
    size = regular_file(path).stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little") if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise UnsafeInputError(
                f"header claims {length} bytes in a file of {size}",
                where=path,
                why="truncated, or not a safetensors file",
                fix="fetch the file again",
            )
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise UnsafeInputError("header is not a JSON object", where=path, why="it must begin with {")
    header = parse_json(raw, where=path)
    if not isinstance(header, dict):
        raise UnsafeInputError("header is not a JSON object", where=path)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, raw, 8 + length) for name, raw in header.items()}
    _check_contiguous(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, raw: object, base: int) -> TensorEntry:
    where = f"{path}: {name}"
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"} or str(raw["dtype"]) not in DTYPES:
        raise UnsafeInputError("tensor entry is malformed or of an unknown dtype", where=where, why=str(raw)[:200])
    shape, offsets = raw["shape"], raw["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or not all(type(n) is int and 0 <= n < 2**62 for n in [*shape, *offsets]):
        raise UnsafeInputError("tensor shape or offsets are not sane numbers", where=where, why=str(raw)[:200])
    entry = TensorEntry(DTYPES[raw["dtype"]], tuple(shape), base + offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise UnsafeInputError("tensor size disagrees with its shape", where=where, why=str(raw)[:200])
    return entry


def _check_contiguous(path: Path, entries: dict[str, TensorEntry], base: int, size: int) -> None:
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if entry.begin != position:
            raise UnsafeInputError("tensors overlap or leave a hole", where=f"{path}: {name}")
        position += entry.nbytes
    if position != size:
        raise UnsafeInputError(
            f"file has {size} bytes, its tensors end at {position}",
            where=path,
            why="truncated or padded",
            fix="fetch the file again",
        )


def map_tensor(path: Path, entry: TensorEntry) -> NDArray[Any]:
    """Memory-map one tensor read-only; pages come and go with use, so memory does not grow with the file."""
    if entry.nbytes == 0:
        return np.zeros(entry.shape, entry.dtype)
    start = entry.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb") as file:
            length = entry.begin - start + entry.nbytes
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start)
        return np.ndarray(entry.shape, entry.dtype, mapped, entry.begin - start)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot map a tensor: {error}", where=path) from error
