"""Counting differences: "lossless" is a number, and it is zero."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.grid.group_affine import GroupAffine
from qalora_export.grid.levels import SymmetricLevels
from qalora_export.grid.packed_affine import PackedAffine


@dataclass(frozen=True, slots=True)
class Differences:
    """How many codes, scales and offsets differ; bit patterns are compared, so -0 differs from +0."""

    codes: int
    scale: int
    offset: int

    @property
    def total(self) -> int:
        return self.codes + self.scale + self.offset

    def __add__(self, other: "Differences") -> "Differences":
        return Differences(self.codes + other.codes, self.scale + other.scale, self.offset + other.offset)


def differing(left: NDArray[Any], right: NDArray[Any]) -> int:
    """Count of elements whose bytes differ; every element when shape or dtype disagree."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return max(left.size, right.size, 1)
    unsigned = np.dtype(f"u{left.dtype.itemsize}")
    view_l, view_r = np.ascontiguousarray(left).view(unsigned), np.ascontiguousarray(right).view(unsigned)
    return int(np.count_nonzero(view_l != view_r))


def packed_difference(left: PackedAffine, right: PackedAffine) -> Differences:
    """The same for packed matrices: codes are compared as bytes, and unpacked only where those differ."""
    if left.bits == right.bits and np.array_equal(left.codes, right.codes):
        return Differences(0, *grid_differences(left, right))
    return difference(left.unpack(), right.unpack())


def difference(left: GroupAffine, right: GroupAffine) -> Differences:
    """Compare two quantized matrices field by field."""
    return Differences(differing(left.codes, right.codes), *grid_differences(left, right))


def grid_differences(left: GroupAffine | PackedAffine, right: GroupAffine | PackedAffine) -> tuple[int, int]:
    """(scales, offsets) that differ. On a grid of super-blocks levels and steps are compared: equal products of others
    are other bytes. A matrix on another grid differs in all of them.
    """
    one, other = left.levels, right.levels
    if one is None or other is None:
        return differing(left.scale, right.scale), differing(left.offset, right.offset)
    if one.grid != other.grid:
        return left.scale.size, left.offset.size
    scales = differing(one.scale, other.scale) + differing(one.scale_step, other.scale_step)
    if isinstance(one, SymmetricLevels) or isinstance(other, SymmetricLevels):
        return scales, 0  # no offset but that of the scale
    return scales, differing(one.offset, other.offset) + differing(one.offset_step, other.offset_step)
