"""Segments and streams of a patch, for any two rows of bytes."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.patches import (
    DELTA,
    INT,
    LARGEST,
    LITERAL,
    SAME,
    Field,
    PatchedFile,
    Segment,
    compress,
    differences,
)

from qalora_export.errors import InputError
from qalora_export.safety import HashedOnce

Bytes = NDArray[np.uint8]


@dataclass
class PatchWriter:
    """Streams of a patch in their order. moved, offsets: values of fields so far."""

    archive: zipfile.ZipFile
    count: int = 0
    moved: int = 0
    offsets: int = 0
    hashed: HashedOnce = field(default_factory=HashedOnce)

    def stream(self, raw: bytes) -> int:
        self.archive.writestr(zipfile.ZipInfo(f"{self.count}.xz"), compress(raw))
        self.count += 1
        return self.count - 1

    def delta(self, old: Bytes, new: Bytes, block: int, fields: list[Field], *, counts: bool = True) -> Segment:
        """old, new: of equal size, whole blocks. counts: whether these are offsets or scales."""
        a, b = old.reshape(-1, block), new.reshape(-1, block)
        if counts:
            for at, width, _, repeat in fields:
                differ = (a[::repeat, at : at + width] != b[::repeat, at : at + width]).any(axis=1)
                self.moved += int(differ.sum())
                self.offsets += len(differ)
        stream = self.stream(differences(a, b, fields))
        return Segment(DELTA, (old.size, new.size), block, tuple(fields), (stream,))

    def anything(self, old: Bytes, new: Bytes) -> Iterator[Segment]:
        """Bytes that mean nothing here: what is equal at both ends is left out."""
        if np.array_equal(old, new):
            yield from same(len(old))
            return
        if len(old) == len(new):
            yield self.delta(old, new, 1, [(0, 1, INT, 1)], counts=False)
            return
        shorter = min(len(old), len(new))
        head = _equal(old[:shorter], new[:shorter])
        tail = _equal(old[head:][::-1][: shorter - head], new[head:][::-1][: shorter - head])
        middle = [side[head : len(side) - tail] for side in (old, new)]
        if max(map(len, middle)) > LARGEST:
            raise InputError(
                "the artifacts have too little in common for a patch",
                why="it holds other tensors, or holds them elsewhere",
            )
        yield from same(head)
        streams = [self.stream(part.tobytes()) for part in middle]
        yield Segment(LITERAL, (len(middle[0]), len(middle[1])), streams=(streams[0], streams[1]))
        yield from same(tail)

    def file(self, path: str, old: Path | None, new: Path | None, segments: Iterator[Segment]) -> PatchedFile:
        sides = (None if side is None else self._side(side) for side in (old, new))
        return PatchedFile(path, *sides, tuple(segments))

    def _side(self, path: Path) -> dict[str, Any]:
        return {"size": path.stat().st_size, "sha256": self.hashed(path)}


def same(length: int) -> Iterator[Segment]:
    if length:
        yield Segment(SAME, (length, length))


def _equal(a: Bytes, b: Bytes) -> int:
    """How many bytes are equal from the start."""
    wrong = np.flatnonzero(a != b)
    return int(wrong[0]) if wrong.size else len(a)


def not_one_base(name: str, why: str) -> InputError:
    return InputError(
        "the two artifacts are not fine-tunes of one base",
        where=name,
        why=f"{why}; training moves offsets, and scales where it was told to",
        fix="export two merges of the same base with the same settings",
    )


def plain(old: Path, new: Path, writer: PatchWriter) -> Iterator[Segment]:
    return writer.anything(*(bytes_of(path) for path in (old, new)))


def bytes_of(path: Path) -> Bytes:
    if not path.is_file() or not path.stat().st_size:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "r").view(np.ndarray)
