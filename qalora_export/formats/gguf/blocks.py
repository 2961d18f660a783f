"""GGUF block formats that hold canonical numbers exactly: pure functions GroupAffine → bytes and back.

Sources: ggml/src/ggml-common.h (block_q4_1, block_q4_0, block_q8_0), ggml-quants.c (dequantize_row_*).
A block covers QK = 32 consecutive in-features of one row:

    Q4_1   d: fp16   m: fp16   qs: 16 bytes    w = d·q + m          q in 0..15
    Q4_0   d: fp16             qs: 16 bytes    w = d·(q − 8)        q in 0..15
    Q8_0   d: fp16             qs: 32 int8     w = d·q              q in −128..127

In the 4-bit blocks byte j holds element j in its low nibble and element j + 16 in its high nibble.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.grid import GroupAffine, PackedAffine

QK = 32
HALF = QK // 2
F16 = 2
Q4_1_BYTES = F16 + F16 + HALF
Q4_0_BYTES = F16 + HALF
Q8_0_BYTES = F16 + QK


def to_q4_1(matrix: GroupAffine) -> NDArray[np.uint8]:
    """Codes of 2, 3 or 4 bits -> Q4_1 rows.

    Source: codes (out, in) uint8 ≤ 15, scale and offset (out, in/g) fp16. Destination: (out, in/32 · 20) uint8.
    Lossless: Q4_1 is the canonical form itself. d and m are the bytes of scale and offset, repeated g/32 times when a
    group spans several blocks, and every code fits in a nibble. Raises InputError for g = 16 and 8-bit codes.
    """
    blocks = _empty(matrix, Q4_1_BYTES, max_bits=4, format_name="Q4_1")
    blocks[..., :2] = _repeated(matrix.scale, matrix.group_size)
    blocks[..., 2:4] = _repeated(matrix.offset, matrix.group_size)
    blocks[..., 4:] = _nibbles(matrix.codes)
    return blocks.reshape(matrix.shape[0], -1)


def from_q4_1(rows: NDArray[np.uint8], *, bits: int = 4, group_size: int = QK) -> GroupAffine:
    """Q4_1 rows (out, in/32 · 20) uint8 -> GroupAffine; the inverse of to_q4_1.

    `bits` and `group_size` are what the writer declared; UnsafeInputError when the blocks contradict it.
    """
    blocks = rows.reshape(rows.shape[0], -1, Q4_1_BYTES)
    scale = _grouped(blocks[..., :2], group_size, "scale")
    offset = _grouped(blocks[..., 2:4], group_size, "offset")
    return _matrix(_unpack_nibbles(blocks[..., 4:]), scale, offset, bits)


def to_q4_0(matrix: GroupAffine) -> NDArray[np.uint8]:
    """Codes of 2, 3 or 4 bits -> Q4_0 rows (out, in/32 · 18) uint8: d = scale, nibbles = codes.

    The value of a block is s·(q − 8). That is the canonical value exactly when offset = −8·s; otherwise the caller
    adds the remainder R = m + 8·s elsewhere (layout "split").
    """
    blocks = _empty(matrix, Q4_0_BYTES, max_bits=4, format_name="Q4_0")
    blocks[..., :2] = _repeated(matrix.scale, matrix.group_size)
    blocks[..., 2:] = _nibbles(matrix.codes)
    return blocks.reshape(matrix.shape[0], -1)


def from_q4_0(rows: NDArray[np.uint8], *, bits: int = 4, group_size: int = QK) -> GroupAffine:
    """Q4_0 rows -> GroupAffine with offset = −8·s, which fp16 holds exactly unless it overflows (InputError)."""
    blocks = rows.reshape(rows.shape[0], -1, Q4_0_BYTES)
    scale = _grouped(blocks[..., :2], group_size, "scale")
    return _matrix(_unpack_nibbles(blocks[..., 2:]), scale, implied_offset(scale, 8), bits)


def to_q8_0(matrix: GroupAffine) -> NDArray[np.uint8]:
    """8-bit codes -> Q8_0 rows (out, in/32 · 34) uint8: d = scale, qs = codes − 128 as int8.

    The value of a block is s·(q − 128): the canonical value exactly when offset = −128·s. Raises InputError for g = 16
    and codes of fewer bits.
    """
    if matrix.bits != 8:
        raise InputError(f"Q8_0 holds 8-bit codes, these have {matrix.bits} bits")
    blocks = _empty(matrix, Q8_0_BYTES, max_bits=8, format_name="Q8_0")
    blocks[..., :2] = _repeated(matrix.scale, matrix.group_size)
    blocks[..., 2:] = (matrix.codes ^ np.uint8(128)).reshape(blocks.shape[0], -1, QK)  # q − 128 in two's complement
    return blocks.reshape(matrix.shape[0], -1)


def from_q8_0(rows: NDArray[np.uint8], *, bits: int = 8, group_size: int = QK) -> GroupAffine:
    """Q8_0 rows -> GroupAffine with offset = −128·s (InputError where that overflows fp16)."""
    blocks = rows.reshape(rows.shape[0], -1, Q8_0_BYTES)
    scale = _grouped(blocks[..., :2], group_size, "scale")
    codes = (blocks[..., 2:] ^ np.uint8(128)).reshape(rows.shape[0], -1)
    return _matrix(codes, scale, implied_offset(scale, 128), bits)


def implied_offset(scale: NDArray[np.float16], zero: int) -> NDArray[np.float16]:
    """fp16 (−zero · s) for zero a power of two: exact, since it only moves the exponent. InputError on overflow."""
    with np.errstate(over="ignore"):
        offset = (-np.float32(zero) * scale.astype(np.float32)).astype(np.float16)
    if not np.isfinite(offset).all():
        raise InputError(f"−{zero}·scale overflows fp16", why=f"a scale exceeds {65504 / zero:g}")
    return offset


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One GGUF quantized type. zero: the integer z of w = d·(q − z), or None where the block carries its own min."""

    name: str
    block_bytes: int
    bits: tuple[int, ...]
    zero: int | None
    encode: Callable[[GroupAffine], NDArray[np.uint8]]
    decode: Callable[..., GroupAffine]


BLOCK_FORMATS = {
    fmt.name: fmt
    for fmt in (
        BlockFormat("Q4_1", Q4_1_BYTES, (2, 3, 4), None, to_q4_1, from_q4_1),
        BlockFormat("Q4_0", Q4_0_BYTES, (2, 3, 4), 8, to_q4_0, from_q4_0),
        BlockFormat("Q8_0", Q8_0_BYTES, (8,), 128, to_q8_0, from_q8_0),
    )
}


def remainder(matrix: GroupAffine | PackedAffine, zero: int, *, where: str) -> NDArray[np.float32]:
    """R = m + zero·s, float32 (out, in/g): what a block format with a fixed zero leaves over.

    Raises InputError when float32 cannot hold R exactly (m and s more than about 13 binary orders apart); float64
    always can, as fp16 spans 40 binary orders.
    """
    exact = matrix.offset.astype(np.float64) + zero * matrix.scale.astype(np.float64)
    held = exact.astype(np.float32)
    if not np.array_equal(held.astype(np.float64), exact):
        raise InputError(
            "offset + zero · scale is not exact in float32",
            where=where,
            why="scale and offset of one group are too many binary orders apart",
            fix="export this checkpoint with layout q4_1",
        )
    return held


def exact_format(matrix: GroupAffine, *, where: str) -> BlockFormat:
    """The GGUF type that holds the matrix by itself (layout q4_1). Raises InputError when there is none."""
    check_group(matrix.group_size, where=where)
    if matrix.bits < 8:
        return BLOCK_FORMATS["Q4_1"]
    if not matrix.is_symmetric:
        raise InputError(
            "8-bit codes with a free offset have no exact GGUF type",
            where=where,
            why="Q8_0 is symmetric: its offset is −128·scale",
            fix="export to ONNX, which holds them; or use layout split; or quantize this module with "
            "sym = true or at 4 bits",
        )
    return BLOCK_FORMATS["Q8_0"]


def check_group(group_size: int, *, where: str) -> None:
    """GGUF blocks cover 32 in-features, so smaller groups do not fit. Raises InputError."""
    if group_size % QK:
        raise InputError(
            f"group size {group_size} does not fit GGUF blocks of {QK}",
            where=where,
            fix="quantize with group_size 32, 64 or 128, or export to ONNX",
        )


def _empty(matrix: GroupAffine, block_bytes: int, *, max_bits: int, format_name: str) -> NDArray[np.uint8]:
    check_group(matrix.group_size, where=format_name)
    if matrix.bits > max_bits:
        raise InputError(f"{matrix.bits}-bit codes do not fit {format_name}")
    out, columns = matrix.shape
    return np.empty((out, columns // QK, block_bytes), np.uint8)


def _repeated(values: NDArray[np.float16], group_size: int) -> NDArray[np.uint8]:
    """fp16 (out, in/g) -> its little-endian bytes per block, (out, in/32, 2)."""
    per_block = np.repeat(values.astype("<f2", copy=False), group_size // QK, axis=1)
    return np.ascontiguousarray(per_block).view(np.uint8).reshape(*per_block.shape, F16)


def _grouped(raw: NDArray[np.uint8], group_size: int, what: str) -> NDArray[np.float16]:
    """Bytes per block (out, in/32, 2) -> fp16 (out, in/g), after checking that a group's blocks agree."""
    check_group(group_size, where="qalora.modules")
    per_block = np.ascontiguousarray(raw).view("<f2")[..., 0]  # (out, in/32)
    if per_block.shape[1] % (group_size // QK):
        raise UnsafeInputError(f"{per_block.shape[1]} blocks do not divide into groups of {group_size}")
    groups = per_block.reshape(per_block.shape[0], -1, group_size // QK)
    bits = groups.view(np.uint16)
    if not (bits == bits[..., :1]).all():
        raise UnsafeInputError(f"blocks of one group disagree about its {what}", why=f"declared group {group_size}")
    return np.ascontiguousarray(groups[..., 0]).astype(np.float16, copy=False)


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    halves = codes.reshape(codes.shape[0], -1, 2, HALF)  # (out, in/32, low|high, 16)
    return halves[..., 0, :] | (halves[..., 1, :] << np.uint8(4))


def _unpack_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    halves = np.stack([packed & 15, packed >> 4], axis=-2)  # (out, in/32, 2, 16)
    return halves.reshape(packed.shape[0], -1)


def _matrix(codes: NDArray[np.uint8], scale: NDArray[Any], offset: NDArray[Any], bits: int) -> GroupAffine:
    try:
        return GroupAffine(codes, scale, offset, bits)
    except InputError as error:
        raise UnsafeInputError(error.what, why="the blocks contradict the declared bits") from error
