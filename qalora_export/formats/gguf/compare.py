"""What differs between a checkpoint and a GGUF file made from it: the count that must be zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import as_float32
from qalora_export.formats.gguf.read import GgufContents
from qalora_export.formats.gguf.tensor_table import DERIVED
from qalora_export.formats.streaming import prepared, release, row_blocks
from qalora_export.grid import Differences, differing
from qalora_export.models.families import family_of
from qalora_export.progress import track

POSITIVE_ZERO = np.float16(0)  # x + 0 turns −0 into +0 and leaves every other value alone


@dataclass(frozen=True, slots=True)
class Comparison:
    """compared: how many values were looked at; quantized, plain: what differs, by name; a clean file has none."""

    compared: int
    quantized: dict[str, Differences] = field(default_factory=dict)
    plain: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(found.total for found in self.quantized.values()) + sum(self.plain.values())

    def describe(self) -> str:
        """The first few tensors that differ, with counts."""
        lines = [f"{name}: codes {d.codes}, scale {d.scale}, offset {d.offset}" for name, d in self.quantized.items()]
        lines += [f"{name}: {count} values" for name, count in self.plain.items()]
        return "; ".join(lines[:5]) + ("; …" if len(lines) > 5 else "")


def compare(checkpoint: CanonicalCheckpoint, contents: GgufContents, *, quiet: bool = False) -> Comparison:
    """Count differing codes, scales, offsets and other values, tensor by tensor.

    A missing, surplus or differently stored tensor counts with all its values.
    """
    compared, quantized, plain = 0, dict[str, Differences](), dict[str, int]()
    names = list(checkpoint.modules)
    blocks = prepared(
        lambda job: _difference(checkpoint, contents, *job),
        ((module, rows) for module in names for rows in _row_blocks(checkpoint, module)),
    )
    for module in names if quiet else track(names, "read back"):
        found = Differences(0, 0, 0)
        for _ in _row_blocks(checkpoint, module):
            found += next(blocks)
        compared += _values(checkpoint, module, slice(None)).total
        if found.total:
            quantized[module] = found
    expected = _carried(checkpoint)
    for name in expected:
        compared += math.prod(checkpoint.entry(name).shape)
        if count := _plain_difference(checkpoint, contents, name):
            plain[name] = count
    known = {*expected, *(f"{module}.weight" for module in checkpoint.modules)}
    plain |= {name: 1 for name in contents.types if name not in known}
    return Comparison(compared, quantized, plain)


def _carried(checkpoint: CanonicalCheckpoint) -> list[str]:
    """Plain tensors that GGUF carries: all but derived buffers and a tied lm_head."""
    tied = family_of(checkpoint.config).ties_head(checkpoint.config)
    names = [name for name in checkpoint.plain_names() if not name.endswith(DERIVED)]
    return [name for name in names if not (tied and name == "lm_head.weight")]


def plain_differing(source: NDArray[Any], found: NDArray[Any]) -> int:
    """Differing values of a plain tensor; vectors are F32 in GGUF, so the source is widened (exactly) first."""
    if source.ndim == 1 and found.dtype == np.float32:
        return differing(as_float32(source), found)
    return differing(np.asarray(source), found)


def _row_blocks(checkpoint: CanonicalCheckpoint, module: str) -> Iterator[slice]:
    codes = checkpoint.entry(f"{module}.codes")
    return row_blocks(codes.shape[0], codes.nbytes)


def _values(checkpoint: CanonicalCheckpoint, module: str, rows: slice) -> Differences:
    """How many codes, scales and offsets those rows hold."""
    bits, (total, width) = checkpoint.modules[module][0], checkpoint.entry(f"{module}.codes").shape
    count, groups = len(range(total)[rows]), checkpoint.entry(f"{module}.scale").shape[1]
    return Differences(count * width * 8 // bits, count * groups, count * groups)


def _difference(checkpoint: CanonicalCheckpoint, contents: GgufContents, module: str, rows: slice) -> Differences:
    """Packed codes are compared as bytes; only where those differ are codes unpacked and counted."""
    if module not in contents.modules:
        return _values(checkpoint, module, rows)
    left, right = checkpoint.packed(module, rows), contents.packed(module, rows)
    if left.shape != right.shape or left.bits != right.bits:
        return _values(checkpoint, module, rows)
    codes = 0 if np.array_equal(left.codes, right.codes) else differing(left.unpack().codes, right.unpack().codes)
    m_left, m_right = left.offset, right.offset
    if module in contents.offset_is_implied:
        m_left, m_right = m_left + POSITIVE_ZERO, m_right + POSITIVE_ZERO
    return Differences(codes, differing(left.scale, right.scale), differing(m_left, m_right))


def _plain_difference(checkpoint: CanonicalCheckpoint, contents: GgufContents, name: str) -> int:
    entry = checkpoint.entry(name)
    if name not in contents.others or contents.tensor(name).shape != entry.shape:
        return math.prod(entry.shape)
    count = 0
    for rows in row_blocks(entry.shape[0], entry.nbytes):
        found = contents.tensor(name, rows)
        count += plain_differing(contents.carried(name, checkpoint.tensor(name)[rows]), found)
        release(found)
    return count
