"""A GGUF header, parsed and checked against the real file before anything is allocated for its tensors.

Format (ggml docs/gguf.md): "GGUF", u32 version, u64 tensor count, u64 metadata count; metadata (string key, u32 type,
value); tensor infos (string name, u32 rank, u64 dims, u32 type, u64 offset); padding to general.alignment; data.
A file MUST hold every key and tensor name once, tensors back to back in the order of their infos at aligned offsets,
and end with the last of them. llama.cpp requires the same.

Time and memory are linear in the bytes of the header, whatever it claims: arrays of numbers are taken in one step,
strings are walked once. (gguf.GGUFReader takes a microsecond and an object per array element, and hangs on some files.)
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import UnsafeInputError
from qalora_export.safety import MAX_HEADER_BYTES, regular_file

VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_ALIGNMENT = 2**20
MAX_KEYS = 2**14  # a real file has some forty
MAX_TENSORS = 2**16  # the largest mixture of experts, stored expert by expert, has 47,000
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NAME = 63  # GGML_MAX_NAME is 64 with the closing NUL; llama.cpp refuses longer names
MAX_KEY = 65535
# Value types of metadata (enum gguf_type) whose items have a fixed size.
SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("u1"),  # a boolean: 0 or 1
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
BOOL, STRING, ARRAY, UINT32 = 7, 8, 9, 4
WORD = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """name, ggml type number, shape row-major, absolute file offset and size in bytes."""

    name: str
    type: int
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Field:
    """One metadata value. kind: enum gguf_type; item: that of the elements when kind is ARRAY, else None.

    stored: a str, an array of one number, a list of str, or an array of numbers.
    """

    kind: int
    item: int | None
    stored: str | list[str] | NDArray[Any]

    @property
    def value(self) -> Any:
        """As Python has it: str, bool, int, float, or a list of them. A list of numbers is made anew each time."""
        if isinstance(self.stored, np.ndarray):
            is_bool = BOOL in (self.kind, self.item)
            numbers = (self.stored.astype(bool) if is_bool else self.stored).tolist()
            return numbers if self.kind == ARRAY else numbers[0]
        return self.stored


@dataclass(frozen=True, slots=True)
class Header:
    """fields: metadata by key; tensors: in the order of the file."""

    fields: dict[str, Field]
    tensors: list[TensorInfo]


def read_header(path: Path) -> Header:
    """Parse and check. Raises InputError when the file is missing, UnsafeInputError when anything is off."""
    with regular_file(path, "GGUF file").open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UnsafeInputError("not a GGUF file", where=path, why="it does not begin with the magic 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            return _parsed(_Cursor(raw, path))


def parse_header(raw: bytes, size: int, where: Path) -> Header:
    """The header of a file that is not there: its first bytes, and how many it would have. Errors as in read_header."""
    return _parsed(_Cursor(raw, where, size))


def _parsed(cursor: _Cursor) -> Header:
    cursor.take(4)
    version, tensor_count, key_count = struct.unpack("<IQQ", cursor.take(20))
    if version not in VERSIONS:
        raise UnsafeInputError(f"GGUF version {version} is unknown", where=cursor.path, why=f"known: {VERSIONS}")
    # The smallest metadata entry takes 8 + 1 + 4 + 1 bytes, the smallest tensor info 8 + 1 + 4 + 8 + 4 + 8.
    if key_count * 14 + tensor_count * 33 > cursor.size or key_count > MAX_KEYS or tensor_count > MAX_TENSORS:
        raise UnsafeInputError(
            f"header claims {key_count} keys and {tensor_count} tensors",
            where=cursor.path,
            why=f"the file has {cursor.size} bytes; at most {MAX_KEYS} and {MAX_TENSORS} are read",
        )
    fields: dict[str, Field] = {}
    for _ in range(key_count):
        key = cursor.text(MAX_KEY)
        if not key or key in fields:
            raise UnsafeInputError(f"metadata key {key!r} is empty or repeated", where=cursor.path)
        fields[key] = _field(cursor, key)
    raw = [_tensor(cursor) for _ in range(tensor_count)]
    return Header(fields, _placed(cursor, raw, _alignment(fields, cursor.path)))


class _Cursor:
    """Sequential reads that never go past the end of the file or the cap on headers."""

    def __init__(self, raw: mmap.mmap | bytes, path: Path, size: int | None = None) -> None:
        self.raw, self.path, self.size, self.at = raw, path, len(raw) if size is None else size, 0
        self.limit = min(len(raw), MAX_HEADER_BYTES)

    def take(self, count: int) -> bytes:
        if count > self.limit - self.at:
            raise UnsafeInputError(
                f"header wants {count} bytes at offset {self.at}",
                where=self.path,
                why=f"truncated or lying: the file has {self.size} bytes, and a header may have {MAX_HEADER_BYTES}",
            )
        self.at += count
        return self.raw[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, most: int) -> str:
        (length,) = WORD.unpack(self.take(8))
        if length > most:
            raise UnsafeInputError(
                f"a string of {length} bytes at offset {self.at}",
                where=self.path,
                why=f"at most {most} are allowed there",
            )
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnsafeInputError("a string is not UTF-8", where=f"{self.path} at offset {self.at}") from error


def _field(cursor: _Cursor, key: str) -> Field:
    kind, item, count = cursor.number("<I"), None, 1
    if kind == STRING:
        return Field(kind, None, cursor.text(cursor.size))
    if kind == ARRAY:
        item, count = cursor.number("<I"), cursor.number("<Q")
    scalar = kind if item is None else item
    smallest = 8 if scalar == STRING else SCALARS[scalar].itemsize if scalar in SCALARS else 0
    if not smallest:
        raise UnsafeInputError(f"{key} has unknown type {scalar}", where=cursor.path)
    if count * smallest > cursor.limit - cursor.at:
        raise UnsafeInputError(f"{key} claims {count} items", where=cursor.path, why="the file is smaller")
    if scalar == STRING:
        return Field(kind, item, [cursor.text(cursor.size) for _ in range(count)])
    values = np.frombuffer(cursor.take(count * smallest), SCALARS[scalar])
    if scalar == BOOL and count and values.max() > 1:
        raise UnsafeInputError(f"{key} is a boolean with value {values.max()}", where=cursor.path)
    return Field(kind, item, values)


def _alignment(fields: dict[str, Field], path: Path) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return ALIGNMENT
    if field.kind != UINT32 or not 8 <= field.value <= MAX_ALIGNMENT or field.value & (field.value - 1):
        raise UnsafeInputError(f"alignment {field.value!r} is not a power of two", where=path)
    return int(field.value)


def _tensor(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.text(MAX_NAME)
    rank = cursor.number("<I")
    if not 1 <= rank <= MAX_DIMS:
        raise UnsafeInputError(f"tensor has {rank} dimensions", where=f"{cursor.path}: {name}")
    *dims, kind, offset = struct.unpack(f"<{rank}QIQ", cursor.take(8 * rank + 12))
    return name, kind, tuple(dims[::-1]), offset  # GGUF lists the fastest dimension first


def _placed(cursor: _Cursor, raw: list[tuple[str, int, tuple[int, ...], int]], alignment: int) -> list[TensorInfo]:
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    base, position = _padded(cursor.at, alignment), 0
    infos: dict[str, TensorInfo] = {}
    for name, kind, shape, offset in raw:
        where = f"{cursor.path}: {name}"
        if not name or name in infos:
            raise UnsafeInputError("tensor name is empty or repeated", where=where)
        if kind not in sizes or 0 in shape or shape[-1] % sizes[kind][0]:
            raise UnsafeInputError(f"type {kind} does not fit shape {shape}", where=where)
        if offset != position:
            raise UnsafeInputError(
                f"tensor lies at {offset}, expected {position}",
                where=where,
                why="tensors overlap, leave a hole or are not aligned",
            )
        nbytes = math.prod(shape) // sizes[kind][0] * sizes[kind][1]
        infos[name] = TensorInfo(name, kind, shape, base + offset, nbytes)
        position = _padded(offset + nbytes, alignment)
        if base + offset + nbytes > cursor.size:
            raise UnsafeInputError(
                f"tensor ends at {base + offset + nbytes}, the file at {cursor.size}",
                where=where,
                why="truncated",
                fix="fetch or export the file again",
            )
    if raw and cursor.size > base + position:
        raise UnsafeInputError(f"{cursor.size - base - position} bytes after the last tensor", where=cursor.path)
    return list(infos.values())


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment
