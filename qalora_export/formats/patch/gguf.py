"""Two GGUF files of one base: a delta of the offsets of each tensor, once for all blocks of a group; and of the scales
where they were trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.patches import FLOAT, INT, Field, Segment

from qalora_export.errors import InputError
from qalora_export.formats.gguf.block_type import BlockType
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.super_blocks import SuperBlockType
from qalora_export.formats.gguf.types import BLOCK_TYPES
from qalora_export.formats.patch.writer import Bytes, PatchWriter, not_one_base, same
from qalora_export.progress import track

REPEATS = (4, 2)  # blocks of 32 in groups of 128 and 64
MOVED = ("m", "dmin", "scales")  # parts of a block that hold offsets; `scales` holds levels of scales as well
SCALE = "d"  # scales, or their step; trained or not


def gguf_segments(old: Path, new: Path, writer: PatchWriter) -> Iterator[Segment]:
    sides = GgufFile(old), GgufFile(new)
    tensors = [list(side.tensors.values()) for side in sides]
    layouts = [[(t.info.name, t.info.type, t.info.shape) for t in side] for side in tensors]
    if layouts[0] != layouts[1]:
        raise InputError("the two files hold other tensors", where=f"{old}, {new}", why="they are not of one base")
    at = [0, 0]
    for a, b in track(list(zip(*tensors, strict=True)), "export patch, tensors"):
        begins = (a.info.begin, b.info.begin)
        yield from writer.anything(*(t.data[i:j] for t, i, j in zip((a, b), at, begins, strict=True)))
        rows = [np.ascontiguousarray(t.rows).reshape(-1) for t in (a, b)]
        yield from gguf_tensor(a.info.name, a.kind, rows[0], rows[1], writer)
        at = [t.info.begin + t.info.nbytes for t in (a, b)]
    yield from writer.anything(*(side[0].data[i:] for side, i in zip(tensors, at, strict=True)))


def gguf_tensor(name: str, kind: str, old: Bytes, new: Bytes, writer: PatchWriter) -> Iterator[Segment]:
    if np.array_equal(old, new):
        yield from same(len(old))
        return
    if kind == "F32" and name.endswith(".lora_b"):  # the split layout's offsets
        yield writer.delta(old, new, 4, [(0, 4, FLOAT, 1)])
        return
    block = BLOCK_TYPES.get(kind)
    if block is None:
        raise not_one_base(name, f"{kind} holds no offsets")
    _require_codes(name, block, old, new)
    blocks = [side.reshape(-1, block.layout.itemsize) for side in (old, new)]
    trained = () if _equal(block, [SCALE], blocks) else (SCALE,)
    names = [part for part in block.layout.names or () if part in (*MOVED, *trained)]
    fields = [one for part in names for one in _fields(block, part, blocks)]
    if not fields:
        raise not_one_base(name, f"{kind} holds no offsets of its own")
    yield writer.delta(old, new, block.layout.itemsize, fields)


def _fields(block: type[BlockType], part: str, blocks: list[Bytes]) -> Iterator[Field]:
    """A float16 as one field, once for all blocks of a group; levels byte by byte."""
    dtype, at = _place(block, part)
    if dtype != np.dtype("<u2"):
        yield from ((at + i, 1, INT, 1) for i in range(dtype.itemsize))
        return
    columns = [np.ascontiguousarray(side[:, at : at + 2]).view("<u2").reshape(-1) for side in blocks]
    repeat = next((n for n in REPEATS if all(_repeats(column, n) for column in columns)), 1)
    yield at, 2, FLOAT, repeat


def _place(block: type[BlockType], part: str) -> tuple[np.dtype[Any], int]:
    """dtype of a part of a block, and where it begins."""
    dtype, at = (block.layout.fields or {})[part][:2]  # type: ignore[index]
    return dtype, at


def _repeats(column: NDArray[Any], times: int) -> bool:
    if len(column) % times:
        return False
    groups = column.reshape(-1, times)
    return bool((groups == groups[:, :1]).all())


def _require_codes(name: str, block: type[BlockType], old: Bytes, new: Bytes) -> None:
    """Raise InputError unless codes are equal, and always on a symmetric grid of super-blocks, which is not trained."""
    if issubclass(block, SuperBlockType) and "dmin" not in (block.layout.names or ()):
        raise not_one_base(name, "its grid is symmetric: it holds no offsets, and its scales are not trained")
    kept = [part for part in block.layout.names or () if part not in (*MOVED, SCALE)]
    if not _equal(block, kept, [side.reshape(-1, block.layout.itemsize) for side in (old, new)]):
        raise not_one_base(name, "codes differ")


def _equal(block: type[BlockType], parts: list[str], blocks: list[Bytes]) -> bool:
    """Whether these parts of all blocks are equal."""
    places, (a, b) = [_place(block, part) for part in parts], blocks
    return all(np.array_equal(a[:, at : at + d.itemsize], b[:, at : at + d.itemsize]) for d, at in places)
