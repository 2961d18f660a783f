"""The canonical form of a quantized matrix (DESIGN.md, "Canonical form").

    w[o, i] = s[o, i // g] · q[o, i] + m[o, i // g]

evaluated in float32: s·q is exact (11-bit significand times at most 8-bit code fits in 24 bits; 17 and 4 on a grid of
super-blocks), so there is exactly one rounding, and numpy, C with or without FMA, and torch agree bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.grid.levels import AnyLevels
from qalora_export.grid.named import AFFINE16, BITS, NamedGrid

GROUP_SIZES = (16, 32, 64, 128)
BLOCK_VALUES = 2**16  # dequantized at a time: 256 KiB of float32


@dataclass(frozen=True, slots=True, eq=False)
class GroupAffine:
    """codes uint8 (out, in), scale float16 (out, in//g), offset float16 (out, in//g), bits one of BITS.

    Groups run along in-features in order: column i belongs to group i // g. levels: what scale and offset are made of
    on a grid of super-blocks, where both are float32 (`on_levels`); None where only their products are known. Raises
    InputError when shapes or dtypes disagree, a code does not fit in `bits`, or a scale or offset is not finite.
    """

    codes: NDArray[np.uint8]
    scale: NDArray[Any]
    offset: NDArray[Any]
    bits: int
    levels: AnyLevels | None = None

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise InputError(
                f"not a quantized matrix: {problem}",
                why='see DESIGN.md, "Canonical form"',
            )

    @classmethod
    def on_levels(cls, codes: NDArray[np.uint8], levels: AnyLevels) -> "GroupAffine":
        """The matrix with these codes, uint8 (out, in), on a grid of super-blocks."""
        return cls(codes, levels.scales(), levels.offsets(), levels.grid.bits, levels)

    @property
    def grid(self) -> NamedGrid:
        return AFFINE16 if self.levels is None else self.levels.grid

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        return int(self.codes.shape[1]) // int(self.scale.shape[1])

    @property
    def is_symmetric(self) -> bool:
        """True when offset is exactly -2^(bits-1) · scale in every group (compared as numbers, so -0 equals 0)."""
        middle = np.float32(2 ** (self.bits - 1))
        return bool(np.array_equal(self.offset.astype(np.float32), -middle * self.scale.astype(np.float32)))

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix in float32 (out, in); one rounding per element."""
        return _in_blocks(self, lambda q, s, m: np.add(np.multiply(q, s, out=q), m, out=q))


def centred(matrix: GroupAffine) -> NDArray[np.float32]:
    """A symmetric matrix as s·(q − 2^(bits−1)), float32 (out, in): the numbers of `dequantize`, with the sign of zero
    that runtimes give to a middle code beside a scale below 0.
    """
    middle = np.float32(2 ** (matrix.bits - 1))
    return _in_blocks(matrix, lambda q, s, _: np.multiply(np.subtract(q, middle, out=q), s, out=q))


def _in_blocks(
    matrix: GroupAffine, change: Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], object]
) -> NDArray[np.float32]:
    """(out, in): codes as float32, changed in place by change(codes (n, in/g, g), scale, offset (n, in/g, 1)), some
    rows at a time, that stay in the caches.
    """
    out = np.empty((*matrix.scale.shape, matrix.group_size), np.float32)
    codes, size = matrix.codes.reshape(out.shape), max(1, BLOCK_VALUES // matrix.shape[1])
    for begin in range(0, len(out), size):
        rows = slice(begin, begin + size)
        out[rows] = codes[rows]
        change(out[rows], *(part[rows].astype(np.float32)[..., None] for part in (matrix.scale, matrix.offset)))
    return out.reshape(matrix.shape)


def implied_offset(scale: NDArray[np.float16], zero: int | NDArray[np.uint8]) -> NDArray[np.float16]:
    """fp16(−zero · s): the offset that an integer zero stands for. Exact when zero is a power of two and it fits.

    Infinite where fp16 does not hold it, and no quantized matrix may have that.
    """
    with np.errstate(over="ignore"):
        return (-np.asarray(zero, np.float32) * scale.astype(np.float32)).astype(np.float16)


def _problem(matrix: GroupAffine) -> str:
    codes, scale, offset, bits = matrix.codes, matrix.scale, matrix.offset, matrix.bits
    products = scale.dtype == offset.dtype == np.float32
    if bits not in BITS:
        return f"bits is {bits}, not one of {BITS}"
    free = matrix.levels is None and scale.dtype == offset.dtype == np.float16
    if codes.dtype != np.uint8 or not (products or free):
        return f"dtypes are {codes.dtype}, {scale.dtype}, {offset.dtype}, not uint8, float16, float16"
    if codes.ndim != 2 or scale.ndim != 2 or scale.shape != offset.shape or scale.shape[0] != codes.shape[0]:
        return f"shapes {codes.shape}, {scale.shape}, {offset.shape} do not belong together"
    if 0 in codes.shape or scale.shape[1] == 0 or codes.shape[1] % scale.shape[1]:
        return f"{codes.shape[1]} in-features do not divide into {scale.shape[1]} groups"
    if codes.shape[1] // scale.shape[1] not in GROUP_SIZES:
        return f"group size {codes.shape[1] // scale.shape[1]} is not one of {GROUP_SIZES}"
    if bits < 8 and int(codes.max()) >> bits:
        return f"code {int(codes.max())} does not fit in {bits} bits"
    if not (np.isfinite(scale).all() and np.isfinite(offset).all()):
        return "a scale or offset is NaN or infinite"
    return "" if matrix.levels is None else _beside_levels(matrix, matrix.levels)


def _beside_levels(matrix: GroupAffine, levels: AnyLevels) -> str:
    grid = levels.grid
    if (matrix.bits, matrix.group_size) != (grid.bits, grid.group_size):
        return f"{matrix.bits} bits in groups of {matrix.group_size} are not on grid {grid.name}"
    same = np.array_equal(matrix.scale, levels.scales()) and np.array_equal(matrix.offset, levels.offsets())
    return "" if same else "scale and offset are not those of the levels"
