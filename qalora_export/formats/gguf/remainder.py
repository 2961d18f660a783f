"""The numbers of layout "split": what a block type with an implied zero leaves over, and back.

R = m + zero·s          m = R − zero·s          lora_b · (lora_a · x) = R · groupsum(x)
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.exact_sum import exact_sum
from qalora_export.grid import PackedAffine


def remainder(scale: NDArray[np.float16], offset: NDArray[np.float16], zero: int, *, where: str) -> NDArray[np.float32]:
    """R = m + zero·s, float32 (out, in/g): what a block format with a fixed zero leaves over.

    zero·s is exact in float32. Raises InputError when R is not (m and s more than about 13 binary orders apart).
    """
    held, inexact = exact_sum(offset.astype(np.float32), np.float32(zero) * scale.astype(np.float32))
    if inexact.any():
        raise InputError(
            "offset + zero · scale is not exact in float32",
            where=where,
            why="scale and offset of one group are too many binary orders apart",
            fix="export this checkpoint with layout q4_1",
        )
    return held


def with_remainder(matrix: PackedAffine, rest: NDArray[np.float32], zero: int, *, where: object) -> PackedAffine:
    """The same rows with offset = R − z·s. Raises UnsafeInputError unless that offset is an fp16."""
    if rest.shape != matrix.scale.shape:
        raise UnsafeInputError("not an offset adapter of this matrix", where=where)
    with np.errstate(over="ignore", invalid="ignore"):
        exact, inexact = exact_sum(rest, np.float32(-zero) * matrix.scale.astype(np.float32))
        offset = exact.astype(np.float16)
    if not np.isfinite(offset).all():
        raise UnsafeInputError("a remainder makes an offset that fp16 does not hold", where=where)
    if inexact.any() or not np.array_equal(offset.astype(np.float32), exact):
        raise UnsafeInputError("a remainder does not come from an fp16 offset", where=where)
    return dataclasses.replace(matrix, offset=offset)


def group_indicator(groups: int, group_size: int, rows: slice = slice(None)) -> NDArray[np.float32]:
    """float32 (groups, groups · g), or some rows of it: row k is 1 on group k, so lora_a · x sums each group of x."""
    wanted = np.arange(groups)[rows]
    indicator = np.zeros((len(wanted), groups, group_size), np.float32)
    indicator[np.arange(len(wanted)), wanted] = 1
    return indicator.reshape(len(wanted), -1)
