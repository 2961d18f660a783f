"""A fine-tune as the difference of two artifacts of one base, and putting it into the one that a device has, in place.

A patch is a zip of stored members, nothing pickled: patch.json, and the streams that it numbers, each xz of the
standard library. patch.json describes every file that differs as a row of segments that are the same two rows of bytes
cut at the same places:

    {"kind": "same", "length"}                          equal in both
    {"kind": "delta", "length", "block", "fields", "stream"}   blocks of equal size, of which only `fields` differ
    {"kind": "literal", "lengths": [old, new], "streams": [old, new]}   anything else, both as they are

A field is [at, width, kind, repeat]: `width` bytes at `at` of each block; "float" or "int"; equal in `repeat` blocks in
a row, and stored once. What is stored is the difference modulo 2^(8·width) of the two as unsigned integers, floats in
the order of their values, folded so that small ones of either sign are small, byte plane by byte plane. A difference is
added or taken off, so a patch goes both ways.

Nothing is written unless the target has the bytes that the patch is for, and nothing is kept unless it came out with
the bytes that the patch promises.
"""

from __future__ import annotations

import lzma
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.packs import MAX_JSON, damaged, is_digest, is_inside, parse_json
from qalora_runtimes.protocol import ProtocolError

FORMAT, TABLE = "qalora-patch/1", "patch.json"
SAME, DELTA, LITERAL = "same", "delta", "literal"
FLOAT, INT = "float", "int"
WIDTHS = (1, 2, 4)
MEMORY = 256 << 20  # bytes that decompressing may take
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]  # planes of bytes have no alignment
LARGEST = 1 << 30  # bytes of what is stored as it is
LORA, MANIFEST = ".lora", ".manifest.json"  # what lies beside a single file: model.lora.gguf, model.gguf.manifest.json
COPIED = 16 << 20
OLD, NEW = "old", "new"

Bytes = NDArray[np.uint8]
Field = tuple[int, int, str, int]  # at, width, kind, repeat


def differences(old: Bytes, new: Bytes, fields: list[Field]) -> bytes:
    """The differences of blocks (n, block), uint8, field by field and plane by plane."""
    planes = []
    for at, width, kind, repeat in fields:
        a, b = (_ordered(_column(blocks, at, width)[::repeat], kind) for blocks in (old, new))
        planes.append(_folded(b - a).view(np.uint8).reshape(-1, width).T.tobytes())
    return b"".join(planes)


def with_differences(blocks: Bytes, raw: bytes, fields: list[Field], *, reverse: bool) -> Bytes:
    """A copy of blocks (n, block) to which `raw` is added, or with reverse, from which it is taken."""
    found, begin = blocks.copy(), 0
    for at, width, kind, repeat in fields:
        count = -(-len(blocks) // repeat)
        planes = np.frombuffer(raw, np.uint8, count * width, begin).reshape(width, count)
        begin += count * width
        step = _unfolded(np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(-1))
        values = _ordered(_column(blocks, at, width)[::repeat], kind)
        moved = _stored(values - step if reverse else values + step, kind)
        whole = np.repeat(moved, repeat)[: len(blocks)]
        found[:, at : at + width] = whole.view(np.uint8).reshape(-1, width)
    return found


def _column(blocks: Bytes, at: int, width: int) -> NDArray[Any]:
    return np.ascontiguousarray(blocks[:, at : at + width]).view(f"<u{width}").reshape(-1)


def _ordered(values: NDArray[Any], kind: str) -> NDArray[Any]:
    """Bits of floats as integers in the order of their values; others as they are."""
    if kind == INT:
        return values
    sign = values.dtype.type(1 << (8 * values.dtype.itemsize - 1))
    return np.where(values & sign, ~values, values | sign)


def _stored(values: NDArray[Any], kind: str) -> NDArray[Any]:
    """The inverse of _ordered."""
    if kind == INT:
        return values
    sign = values.dtype.type(1 << (8 * values.dtype.itemsize - 1))
    return np.where(values & sign, values & ~sign, ~values)


def _folded(step: NDArray[Any]) -> NDArray[Any]:
    """0, -1, 1, -2, … as 0, 1, 2, 3, …"""
    signed = step.view(f"<i{step.dtype.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * step.dtype.itemsize - 1))).view(step.dtype)


def _unfolded(folded: NDArray[Any]) -> NDArray[Any]:
    one = folded.dtype.type(1)
    return (folded >> one) ^ (~(folded & one) + one)


def compress(raw: bytes) -> bytes:
    return lzma.compress(raw, lzma.FORMAT_XZ, filters=FILTERS)


def decompress(stream: bytes, size: int) -> bytes:
    """Exactly `size` bytes. Raises ProtocolError for any other stream, whatever it claims."""
    try:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)
        raw = decoder.decompress(stream, size + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ProtocolError(f"damaged: {error}") from error
    if len(raw) != size or not (decoder.eof or not size):
        raise ProtocolError(f"has not the {size} bytes that it should have")
    return raw


@dataclass(frozen=True)
class Segment:
    """One of the three kinds above; lengths: bytes in the old and in the new file."""

    kind: str
    lengths: tuple[int, int]
    block: int = 1
    fields: tuple[Field, ...] = ()
    streams: tuple[int, ...] = ()

    @property
    def raw(self) -> int:
        """Bytes of a delta's stream, decompressed."""
        count = self.lengths[0] // self.block
        return sum(-(-count // repeat) * width for _, width, _, repeat in self.fields)

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "lengths": self.lengths,
            "block": self.block,
            "fields": self.fields,
            "streams": self.streams,
        }

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Segment:
        """Raises KeyError, TypeError or ValueError for what is no segment."""
        fields = tuple((int(at), int(width), str(kind), int(repeat)) for at, width, kind, repeat in table["fields"])
        old, new = (_natural(value) for value in table["lengths"])
        block, streams = _natural(table["block"]), tuple(map(_natural, table["streams"]))
        found = cls(str(table["kind"]), (old, new), block, fields, streams)
        expected = {SAME: 0, DELTA: 1, LITERAL: 2}[found.kind]
        right = len(streams) == expected and (max(old, new) <= LARGEST if found.kind == LITERAL else old == new)
        if found.kind == DELTA:
            right = right and block > 0 and old % block == 0 and 0 < sum(field[1] for field in fields) <= block
            right = right and all(
                width in WIDTHS and 0 <= at <= block - width and kind in (FLOAT, INT) and 0 < repeat <= max(1, old)
                for at, width, kind, repeat in fields
            )
        if not right:
            raise ValueError("a segment that cannot be")
        return found


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


@dataclass(frozen=True)
class PatchedFile:
    """A file that differs. path: in the folder, or by `beside` for a single file. old, new: {size, sha256}, None where
    the file is only in the other.
    """

    path: str
    old: Mapping[str, Any] | None
    new: Mapping[str, Any] | None
    segments: tuple[Segment, ...] = ()

    def side(self, side: str) -> Mapping[str, Any] | None:
        return self.old if side == OLD else self.new


@dataclass(frozen=True)
class Table:
    """What patch.json says. kind: "file" or "folder". names: of the old and new artifact, for messages. same: sha256 of
    the files that do not differ, by path.
    """

    kind: str
    names: Mapping[str, str]
    files: tuple[PatchedFile, ...]
    same: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        files = [
            {"path": f.path, OLD: f.old, NEW: f.new, "segments": [s.as_json() for s in f.segments]} for f in self.files
        ]
        return {"format": FORMAT, "kind": self.kind, "names": self.names, "files": files, "same": self.same}


class PatchFile:
    """An opened patch, which may hold anything: sizes are checked before memory is taken. Raises ProtocolError."""

    def __init__(self, path: Path) -> None:
        with damaged(f"{path}: is no patch, or"):
            self._archive = zipfile.ZipFile(path)
            infos = self._archive.infolist()
        stored = all(i.compress_type == zipfile.ZIP_STORED and i.compress_size == i.file_size for i in infos)
        if not stored or len({info.filename for info in infos}) != len(infos):
            raise ProtocolError(f"{path}: is no patch: its members must be stored, each once")
        self.path, self._infos = path, {info.filename: info for info in infos}
        self.table = _table(parse_json(self._member(TABLE, MAX_JSON), where=f"{path}: {TABLE}"), path)

    def stream(self, number: int, size: int) -> bytes:
        """A stream, decompressed to exactly `size` bytes."""
        try:
            return decompress(self._member(f"{number}.xz", size + MAX_JSON), size)
        except ProtocolError as error:
            raise ProtocolError(f"{self.path}: {number}.xz: {error}") from error

    def _member(self, name: str, most: int) -> bytes:
        info = self._infos.get(name)
        if info is None or info.file_size > most:
            raise ProtocolError(f"{self.path}: is no patch: no {name} of at most {most} bytes")
        with damaged(f"{self.path}: {name}"):
            return self._archive.read(info)

    def other_side(self, file: PatchedFile, source: Path | None, *, reverse: bool) -> Iterator[bytes]:
        """The bytes of a file after the patch, from those before it, some at a time."""
        mine = 1 if reverse else 0
        data = np.memmap(source, np.uint8, "r") if source is not None and source.stat().st_size else _nothing()
        at = 0
        for segment in file.segments:
            length = segment.lengths[mine]
            part = data[at : at + length]
            if len(part) != length:
                raise ProtocolError(f"{self.path}: describes another file than {source}")
            at += length
            if segment.kind == LITERAL:
                yield self.stream(segment.streams[1 - mine], segment.lengths[1 - mine])
            elif segment.kind == DELTA:
                raw, fields = self.stream(segment.streams[0], segment.raw), list(segment.fields)
                yield with_differences(part.reshape(-1, segment.block), raw, fields, reverse=reverse).tobytes()
            else:
                for begin in range(0, length, COPIED):
                    yield part[begin : begin + COPIED].tobytes()
        if at != len(data):
            raise ProtocolError(f"{self.path}: describes another file than {source}")


def beside(file: Path, path: str) -> Path:
    """Where a part of a single file's artifact lies; path: "", LORA or MANIFEST."""
    return file.with_name(f"{file.stem}{path}{file.suffix}" if path == LORA else f"{file.name}{path}")


def _nothing() -> Bytes:
    return np.empty(0, np.uint8)


def _table(raw: Mapping[str, Any], path: Path) -> Table:
    if raw.get("format") != FORMAT:
        raise ProtocolError(f"{path}: is no patch of this version ({FORMAT}): {raw.get('format')!r}")
    try:
        files = tuple(
            PatchedFile(f["path"], _side(f[OLD]), _side(f[NEW]), tuple(map(Segment.of, f["segments"])))
            for f in raw["files"]
        )
        table = Table(raw["kind"], dict(raw["names"]), files, dict(raw["same"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(f"{path}: is no patch: {error!r}") from error
    paths = [file.path for file in files]
    right = len({*paths, *table.same}) == len(paths) + len(table.same) and all(map(is_digest, table.same.values()))
    if table.kind == "folder":
        right = right and all(map(is_inside, (*paths, *table.same)))
    else:  # the file itself, and its adapter and manifest beside it
        right = right and table.kind == "file" and {*paths, *table.same} <= {"", LORA, MANIFEST}
    if not right:
        raise ProtocolError(f"{path}: names files that it cannot be for")
    return table


def _side(value: Any) -> Mapping[str, Any] | None:
    if value is None:
        return None
    if not is_digest(value["sha256"]):
        raise ValueError("no sha256")
    return {"size": _natural(value["size"]), "sha256": value["sha256"]}
