"""The tensor types of GGUF that we read and write: one class each, registered by being defined.

Sources: ggml/src/ggml-common.h (block_q4_1, …), ggml-quants.c (dequantize_row_*). What all types share, registration
included, is in `block_type.py`.

**To add a block type** write one subclass of BlockType at the end of this file: its numbers, `put_codes` and
`take_codes` (fast, all rows) and `slow_unpack` (obvious, one block). A type whose blocks hold more than d, m and codes
overrides `pack` and `unpack`; those of a grid of super-blocks are in `super_blocks.py`. Nothing else needs an edit to
read it back, compare it, dequantize it, make its F32 twin or inspect it, and tests/formats/gguf/test_types.py tries
every registered type against its oracle and the gguf package. Of several types that hold a matrix exactly the one
registered first is written.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.formats.gguf.block_type import (
    BLOCK_TYPES,
    EIGHT,
    FOUR,
    LOW,
    PLAIN_TYPES,
    QK,
    BlockType,
    GgufType,
    PlainType,
    check_group,
    interleaved,
    swapped,
)
from qalora_export.formats.gguf.super_blocks import Q2_K, Q4_K, Q5_K
from qalora_export.formats.gguf.symmetric_blocks import Q6_K
from qalora_export.grid import AFFINE16, NamedGrid, PackedAffine, SuperBlockGrid
from qalora_export.grid.narrow import BFLOAT16

# The tables come from here, never from block_type: importing this module is what fills them.
__all__ = [
    "BF16",
    "BLOCK_TYPES",
    "F16",
    "F32",
    "PLAIN_TYPES",
    "Q2_K",
    "Q4_0",
    "Q4_1",
    "Q4_K",
    "Q5_0",
    "Q5_1",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "QK",
    "BlockType",
    "GgufType",
    "PlainType",
    "base_type",
    "check_group",
    "exact_type",
    "no_exact_type",
    "no_split",
]
FP16 = 2  # bytes


class F32(PlainType):
    """IEEE single precision."""

    id, file_type, dtype = 0, 0, np.dtype("<f4")


class F16(PlainType):
    """IEEE half precision."""

    id, file_type, dtype = 1, 1, np.dtype("<f2")


class BF16(PlainType):
    """The upper half of an F32."""

    id, file_type, dtype = 30, 32, BFLOAT16


def exact_type(
    bits: int, load: Callable[[], PackedAffine], *, where: str, grid: NamedGrid = AFFINE16
) -> type[BlockType]:
    """The type that holds a matrix by itself; `load` is called where its values decide. InputError when none does."""
    if isinstance(grid, SuperBlockGrid):
        return BLOCK_TYPES[grid.gguf]
    for kind in BLOCK_TYPES.values():
        if kind.holds_all(bits):
            return kind
    matrix = load()
    for kind in BLOCK_TYPES.values():
        if kind.holds(matrix):
            return kind
    raise no_exact_type(bits, where=where)


def no_exact_type(bits: int, *, where: str) -> InputError:
    """The refusal of a matrix that no block type holds."""
    return InputError(
        f"{bits}-bit codes with a free offset have no exact GGUF type",
        where=where,
        why="Q8_0 is symmetric: its offset is −128·scale",
        fix="export to ONNX, which holds them; or use layout split; or quantize this module with "
        "sym = true (and do not train it) or at 4 bits",
    )


def no_split(grid: NamedGrid, *, where: str) -> InputError:
    """The refusal of layout "split" for a grid that has a block type of its own."""
    return InputError(
        f"layout split does not hold grid {grid.name}",
        where=where,
        why="its base is Q4_0, with a free float16 scale for 32 in-features",
        fix="use layout q4_1, which writes each grid in its own blocks",
    )


def base_type(bits: int) -> type[BlockType]:
    """The type with an implied zero that holds codes of these bits and their scale: the base of layout "split".

    Raises InputError where there is none.
    """
    kind = next((kind for kind in BLOCK_TYPES.values() if kind.zero is not None and bits in kind.bits), None)
    if kind is None:
        raise InputError(
            f"layout split does not hold codes of {bits} bits",
            why="its base is Q4_0 or Q8_0",
            fix="use layout q4_1, which writes them as Q5_1" if bits == 5 else "export to ONNX, which holds them",
        )
    return kind


class _Nibbles(BlockType, abstract=True):
    """Codes of 4 bits: byte j of the 16 bytes `qs` = element j | element j+16 << 4 (grid.packing: 2j | 2j+1 << 4).

    As words of eight bytes a = packed 0..7 and b = packed 8..15, the even bytes of `qs` are the low nibbles of a beside
    those of b, the odd ones the high nibbles: 16 codes move at a time, and codes of 4 bits are never unpacked.
    """

    code_bits, bits = 4, (2, 3, 4)

    @classmethod
    def put_codes(cls, blocks: NDArray[Any], codes: NDArray[np.uint8]) -> None:
        a, b = np.ascontiguousarray(codes).reshape(-1).view("<u8").reshape(-1, 2).T
        both = interleaved(*swapped(a, b, LOW, FOUR))
        blocks["qs"] = both.view(f"V{QK // 2}").reshape(blocks.shape)  # opaque items move several times faster

    @classmethod
    def take_codes(cls, blocks: NDArray[Any]) -> NDArray[np.uint8]:
        both = np.ascontiguousarray(blocks["qs"]).view("<u2").reshape(-1)
        even, odd = both.astype(np.uint8).view("<u8"), (both >> EIGHT).astype(np.uint8).view("<u8")
        words = np.empty((even.size, 2), "<u8")
        words[:, 0], words[:, 1] = swapped(even, odd, LOW, FOUR)
        return words.view(np.uint8).reshape(len(blocks), -1)


class Q4_1(_Nibbles):
    """The canonical form itself, w = d·q + m:

    0        2        4                                   20 bytes
    │ d fp16 │ m fp16 │ qs: 16 bytes, see _Nibbles         │
    """

    id, file_type = 3, 3
    layout = np.dtype([("d", "<u2"), ("m", "<u2"), ("qs", f"V{QK // 2}")])  # FP16 + FP16 + QK // 2

    @classmethod
    def slow_unpack(cls, block: bytes) -> tuple[list[int], float, float]:
        d, m = struct.unpack_from("<ee", block)
        return _slow_nibbles(block[2 * FP16 :]), d, m


class Q4_0(_Nibbles):
    """Symmetric about 8, w = d·(q − 8):

    0        2                                   18 bytes
    │ d fp16 │ qs: 16 bytes, see _Nibbles         │
    """

    id, file_type, zero = 2, 2, 8
    layout = np.dtype([("d", "<u2"), ("qs", f"V{QK // 2}")])  # FP16 + QK // 2

    @classmethod
    def slow_unpack(cls, block: bytes) -> tuple[list[int], float, float]:
        (d,) = struct.unpack_from("<e", block)
        return _slow_nibbles(block[FP16:]), d, -cls.zero * d


class Q8_0(BlockType):
    """Symmetric about 128, w = d·(q − 128):

    0        2                                                     34 bytes
    │ d fp16 │ qs: 32 × int8, byte j = q of element j − 128         │
    """

    id, file_type, zero = 8, 7, 128
    code_bits, bits = 8, (8,)
    layout = np.dtype([("d", "<u2"), ("qs", f"V{QK}")])  # FP16 + QK

    @classmethod
    def put_codes(cls, blocks: NDArray[Any], codes: NDArray[np.uint8]) -> None:
        blocks["qs"] = (codes ^ np.uint8(128)).view(f"V{QK}").reshape(blocks.shape)  # q − 128 in two's complement

    @classmethod
    def take_codes(cls, blocks: NDArray[Any]) -> NDArray[np.uint8]:
        return np.ascontiguousarray(blocks["qs"]).view(np.uint8).reshape(len(blocks), -1) ^ np.uint8(128)

    @classmethod
    def slow_unpack(cls, block: bytes) -> tuple[list[int], float, float]:
        d, *q = struct.unpack("<e32b", block)
        return [value + 128 for value in q], d, -cls.zero * d


class _FiveBits(BlockType, abstract=True):
    """Codes of 5 bits: their low nibbles in `qs` as in _Nibbles, bit j of the 32-bit word `qh` = bit 4 of element j.

    They come and go as codes of 8 bits, the least canonical width that holds them.
    """

    code_bits = 5
    bits: ClassVar[tuple[int, ...]] = (8,)

    @classmethod
    def put_codes(cls, blocks: NDArray[Any], codes: NDArray[np.uint8]) -> None:
        q = (codes - np.uint8(cls.first)).reshape(*blocks.shape, 2, QK // 2)  # (out, in/32, low | high, 16)
        qs = (q[..., 0, :] & 15) | (q[..., 1, :] & 15) << np.uint8(4)
        blocks["qs"] = np.ascontiguousarray(qs).view(f"V{QK // 2}").reshape(blocks.shape)
        blocks["qh"] = np.packbits(q.reshape(-1, QK) >> 4, axis=-1, bitorder="little").view("<u4").reshape(blocks.shape)

    @classmethod
    def take_codes(cls, blocks: NDArray[Any]) -> NDArray[np.uint8]:
        qs = np.ascontiguousarray(blocks["qs"]).view(np.uint8).reshape(-1, QK // 2)
        qh = np.ascontiguousarray(blocks["qh"]).view(np.uint8).reshape(-1, QK // 8)
        q = np.concatenate([qs & 15, qs >> 4], axis=-1) | np.unpackbits(qh, axis=-1, bitorder="little") << np.uint8(4)
        codes: NDArray[np.uint8] = (q + np.uint8(cls.first)).reshape(len(blocks), -1)
        return codes

    @classmethod
    def _slow_codes(cls, qh: int, qs: bytes) -> list[int]:
        return [low | (qh >> j & 1) << 4 for j, low in enumerate(_slow_nibbles(qs))]


class Q5_0(_FiveBits):
    """Symmetric about 16, w = d·(q − 16). As 8-bit codes q + 112 it is symmetric about 128, hence also a Q8_0:

    0        2        6                                   22 bytes
    │ d fp16 │ qh: u4 │ qs: 16 bytes, see _FiveBits        │
    """

    id, file_type, zero, first = 6, 8, 128, 112
    layout = np.dtype([("d", "<u2"), ("qh", "<u4"), ("qs", f"V{QK // 2}")])  # FP16 + QK // 8 + QK // 2

    @classmethod
    def slow_unpack(cls, block: bytes) -> tuple[list[int], float, float]:
        d, qh = struct.unpack_from("<eI", block)
        return [q + cls.first for q in cls._slow_codes(qh, block[FP16 + QK // 8 :])], d, -cls.zero * d


class Q5_1(_FiveBits):
    """w = d·q + m with q in 0..31:

    0        2        4        8                                   24 bytes
    │ d fp16 │ m fp16 │ qh: u4 │ qs: 16 bytes, see _FiveBits        │
    """

    id, file_type, bits = 7, 9, (5, 8)
    layout = np.dtype([("d", "<u2"), ("m", "<u2"), ("qh", "<u4"), ("qs", f"V{QK // 2}")])  # Q5_0 + FP16

    @classmethod
    def slow_unpack(cls, block: bytes) -> tuple[list[int], float, float]:
        d, m, qh = struct.unpack_from("<eeI", block)
        return cls._slow_codes(qh, block[2 * FP16 + QK // 8 :]), d, m


def _slow_nibbles(qs: bytes) -> list[int]:
    return [qs[j] & 15 for j in range(QK // 2)] + [qs[j] >> 4 for j in range(QK // 2)]
