"""A GGUF header checked against the real file before any reader allocates for it.

Format (ggml docs/gguf.md): "GGUF", u32 version, u64 tensor count, u64 metadata count; metadata (string key, u32 type,
value); tensor infos (string name, u32 rank, u64 dims, u32 type, u64 offset); padding to general.alignment; data.
A file MUST hold every key and tensor name once, tensors back to back in the order of their infos at aligned offsets,
and end with the last of them. llama.cpp requires the same.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety import MAX_HEADER_BYTES

VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NAME = 63  # GGML_MAX_NAME is 64 with the closing NUL; llama.cpp refuses longer names
MAX_KEY = 65535
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
BOOL, STRING, ARRAY, UINT32 = 7, 8, 9, 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """name, ggml type number, shape row-major, absolute file offset and size in bytes."""

    name: str
    type: int
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def validate_gguf(path: Path) -> list[TensorInfo]:
    """Check the whole header. Raises InputError when the file is missing, UnsafeInputError when anything is off."""
    if not path.is_file():
        raise InputError("GGUF file not found", where=path, fix="check the path")
    with path.open("rb") as file:
        cursor = _Cursor(file, path, path.stat().st_size)
        if cursor.take(4) != b"GGUF":
            raise UnsafeInputError("not a GGUF file", where=path, why="it does not begin with the magic 'GGUF'")
        version = cursor.number("<I")
        if version not in VERSIONS:
            raise UnsafeInputError(f"GGUF version {version} is unknown", where=path, why=f"known: {VERSIONS}")
        tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
        # The smallest metadata entry takes 8 + 1 + 4 + 1 bytes, the smallest tensor info 8 + 1 + 4 + 8 + 4 + 8.
        if key_count * 14 + tensor_count * 33 > cursor.size:
            raise UnsafeInputError(
                f"header claims {key_count} keys and {tensor_count} tensors",
                where=path,
                why=f"the file has {cursor.size} bytes",
            )
        alignment = _keys(cursor, key_count)
        raw = [_tensor(cursor) for _ in range(tensor_count)]
        return _placed(cursor, raw, alignment)


class _Cursor:
    """Sequential reads that never go past the end of the file or the cap on headers."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size, self.at = file, path, size, 0
        self.limit = min(size, MAX_HEADER_BYTES)

    def take(self, count: int) -> bytes:
        if count > self.limit - self.at:
            raise UnsafeInputError(
                f"header wants {count} bytes at offset {self.at}",
                where=self.path,
                why=f"truncated or lying: the file has {self.size} bytes",
            )
        self.at += count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, most: int) -> str:
        length = self.number("<Q")
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


def _keys(cursor: _Cursor, count: int) -> int:
    """Walk the metadata; return the alignment."""
    seen: set[str] = set()
    alignment = ALIGNMENT
    for _ in range(count):
        key = cursor.text(MAX_KEY)
        if not key or key in seen:
            raise UnsafeInputError(f"metadata key {key!r} is empty or repeated", where=cursor.path)
        seen.add(key)
        kind = cursor.number("<I")
        value = _value(cursor, kind, key)
        if key == "general.alignment":
            if kind != UINT32 or value < 8 or value > 2**20 or value & (value - 1):
                raise UnsafeInputError(f"alignment {value!r} is not a power of two", where=cursor.path)
            alignment = value
    return alignment


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == STRING:
        return cursor.text(cursor.size)
    if kind == ARRAY:
        item, length = cursor.number("<I"), cursor.number("<Q")
        if item == STRING:
            if length * 8 > cursor.limit - cursor.at:
                raise UnsafeInputError(f"{key} claims {length} strings", where=cursor.path, why="the file is smaller")
            for _ in range(length):
                cursor.text(cursor.size)
            return None
        if item not in SCALARS:
            raise UnsafeInputError(f"{key} is an array of unknown type {item}", where=cursor.path)
        cursor.take(length * struct.calcsize(SCALARS[item]))
        return None
    if kind not in SCALARS:
        raise UnsafeInputError(f"{key} has unknown type {kind}", where=cursor.path)
    value = cursor.number(SCALARS[kind])
    if kind == BOOL and value > 1:
        raise UnsafeInputError(f"{key} is a boolean with value {value}", where=cursor.path)
    return value


def _tensor(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.text(MAX_NAME)
    rank = cursor.number("<I")
    if not 1 <= rank <= MAX_DIMS:
        raise UnsafeInputError(f"tensor has {rank} dimensions", where=f"{cursor.path}: {name}")
    dims = tuple(cursor.number("<Q") for _ in range(rank))
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    return name, kind, dims[::-1], offset  # GGUF lists the fastest dimension first


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
