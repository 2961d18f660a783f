"""A quantized matrix, or some rows of one, with its codes still packed: what the streaming exporters move about."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.grid.group_affine import GroupAffine
from qalora_export.grid.levels import AnyLevels, Levels, SymmetricLevels
from qalora_export.grid.named import AFFINE16, NamedGrid, SuperBlockGrid, SymmetricGrid
from qalora_export.grid.packing import pack_codes, packed_width, unpack_codes

MAGNITUDE, INFINITY = np.uint16(0x7FFF), 0x7C00  # fp16 bit patterns: order of magnitudes is order of integers


@dataclass(frozen=True, slots=True, eq=False)
class PackedAffine:
    """codes uint8 (out, in·bits/8) as in grid.packing, scale and offset float16 (out, in/g), bits as in GroupAffine.

    levels: what scale and offset, float32 then, are made of on a grid of super-blocks (`on_levels`); None where only
    their products are known. Raises InputError when shapes disagree or a scale or offset is not finite; packed codes
    always fit their bits.
    """

    codes: NDArray[np.uint8]
    scale: NDArray[Any]
    offset: NDArray[Any]
    bits: int
    group_size: int
    levels: AnyLevels | None = None

    def __post_init__(self) -> None:
        out, groups = self.scale.shape
        if self.offset.shape != (out, groups) or self.codes.shape != (out, packed_width(self.shape[1], self.bits)):
            raise InputError(
                f"shapes {self.codes.shape}, {self.scale.shape}, {self.offset.shape} do not belong together"
            )
        if self.levels is None and not (_is_finite(self.scale) and _is_finite(self.offset)):
            raise InputError(
                "not a quantized matrix: a scale or offset is NaN or infinite",
                why='see DESIGN.md, "Canonical form"',
            )

    @classmethod
    def on_levels(cls, codes: NDArray[np.uint8], levels: AnyLevels) -> "PackedAffine":
        """The matrix with these packed codes on a grid of super-blocks."""
        grid = levels.grid
        return cls(codes, levels.scales(), levels.offsets(), grid.bits, grid.group_size, levels)

    @property
    def grid(self) -> NamedGrid:
        return AFFINE16 if self.levels is None else self.levels.grid

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.scale.shape[0], self.scale.shape[1] * self.group_size

    def unpack(self) -> GroupAffine:
        return GroupAffine(unpack_codes(self.codes, self.bits), self.scale, self.offset, self.bits, self.levels)

    @classmethod
    def pack(cls, matrix: GroupAffine) -> "PackedAffine":
        codes = pack_codes(matrix.codes, matrix.bits)
        return cls(codes, matrix.scale, matrix.offset, matrix.bits, matrix.group_size, matrix.levels)


def _is_finite(values: NDArray[Any]) -> bool:
    return fp16_is_finite(values) if values.dtype == np.float16 else bool(np.isfinite(values).all())


def fp16_is_finite(values: NDArray[np.float16]) -> bool:
    """np.isfinite(values).all() on the bit patterns, which is many times faster for fp16."""
    return not values.size or int((values.view(np.uint16) & MAGNITUDE).max()) < INFINITY


def fp16_largest(values: NDArray[np.float16]) -> float:
    """abs(values).max() on the bit patterns; NaN counts as larger than infinity."""
    return float((values.view(np.uint16) & MAGNITUDE).max(keepdims=True, initial=0).view(np.float16).item())


def assembled(grid: NamedGrid, bits: int, group_size: int, codes: NDArray[np.uint8], *numbers: Any) -> PackedAffine:
    """The matrix of packed codes and the numbers beside them, as a checkpoint stores them on that grid: scale and
    offset, and behind them their steps where there are any. Raises InputError for what is no such matrix.
    """
    if isinstance(grid, SymmetricGrid):
        return PackedAffine.on_levels(codes, SymmetricLevels(grid, *numbers))
    if isinstance(grid, SuperBlockGrid):
        return PackedAffine.on_levels(codes, Levels(grid, *numbers))
    scale, offset = numbers
    return PackedAffine(codes, scale, offset, bits, group_size)
