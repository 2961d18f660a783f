"""What a tensor type of GGUF is: plain numbers, or blocks of a scale, perhaps a min, and codes.

A class is registered by being defined; the types themselves are in `types.py` and `super_blocks.py`. Sources:
ggml/src/ggml-common.h (block_q4_1, …), ggml.h (enum ggml_type), llama.h (enum llama_ftype). A block covers QK = 32
consecutive in-features of one row of a matrix, a super-block 256.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.streaming import row_blocks
from qalora_export.grid import (
    AFFINE16,
    NamedGrid,
    PackedAffine,
    SuperBlockGrid,
    implied_offset,
    pack_codes,
    packed_width,
    unpack_codes,
)

QK = 32
LOW, FOUR, EIGHT = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4), np.uint16(8)  # the low nibble of every byte
SLAB_BYTES = 128 << 10  # of codes that change places at a time: what is made on the way stays in a core's cache

BLOCK_TYPES: dict[str, type[BlockType]] = {}
PLAIN_TYPES: dict[str, type[PlainType]] = {}


class GgufType(ABC):
    """name: ggml's, that of the class. id: enum ggml_type. file_type: enum llama_ftype of a file mostly of this type.

    block_size: elements in a block. block_bytes: its bytes.
    """

    name: ClassVar[str]
    id: ClassVar[int]
    file_type: ClassVar[int]
    block_size: ClassVar[int]
    block_bytes: ClassVar[int]

    @classmethod
    def nbytes(cls, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape` (elements, row-major)."""
        return math.prod(shape) // cls.block_size * cls.block_bytes


class PlainType(GgufType):
    """Numbers without blocks: the bytes are those of a numpy dtype."""

    block_size = 1
    dtype: ClassVar[np.dtype[Any]]

    def __init_subclass__(cls) -> None:
        cls.name, cls.block_bytes = cls.__name__, cls.dtype.itemsize
        PLAIN_TYPES[cls.name] = cls


class BlockType(GgufType):
    """Blocks of a scale d, perhaps a min m, and codes:  w = d·q + m, or w = d·(q − zero).

    layout: one block as a record with the fp16 bit patterns `d` and, where zero is None, `m`. code_bits: of a code in
    the block. bits: canonical bits of codes it may hold, the last of which is assumed for files of other tools. first:
    the canonical code of the block's code 0. zero: the implied zero, a canonical code of the most bits, or None where
    each block carries its own min. Codes of fewer bits than such a block's lie in its middle (`shift`): what is
    multiplied with int8 activations is then as small as can be. grid: of the matrices that it holds.
    """

    block_size = QK
    layout: ClassVar[np.dtype[Any]]
    code_bits: ClassVar[int]
    carrier: ClassVar[int]  # canonical bits at which codes come and go: 4 or 8, the least that holds code_bits
    bits: ClassVar[tuple[int, ...]]
    first: ClassVar[int] = 0
    zero: ClassVar[int | None] = None
    grid: ClassVar[NamedGrid] = AFFINE16

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        if abstract:
            return
        cls.name, cls.block_bytes = cls.__name__, cls.layout.itemsize
        cls.carrier = 4 if cls.code_bits <= 4 else 8
        taken = {kind.id: name for name, kind in BLOCK_TYPES.items()}
        if cls.name in BLOCK_TYPES or cls.id in taken:
            raise TypeError(f"GGUF type {cls.name} ({cls.id}) is registered twice: {taken.get(cls.id, cls.name)}")
        BLOCK_TYPES[cls.name] = cls

    @classmethod
    @abstractmethod
    def put_codes(cls, blocks: NDArray[Any], codes: NDArray[np.uint8]) -> None:
        """Write codes (rows, in·carrier/8), packed at `carrier` bits, into the records (rows, in/32)."""

    @classmethod
    @abstractmethod
    def take_codes(cls, blocks: NDArray[Any]) -> NDArray[np.uint8]:
        """The inverse: codes (rows, in·carrier/8), packed at `carrier` bits."""

    @classmethod
    @abstractmethod
    def slow_unpack(cls, block: bytes) -> tuple[list[int], Any, Any]:
        """The oracle of tests: 32 codes, d and m of one block, a byte at a time as ggml declares it; of a super-block
        256 codes, and s and m of each group.
        """

    @classmethod
    def shift(cls, bits: int) -> int:
        """What is added to a canonical code of `bits`: 2^(code_bits−1) − 2^(bits−1) where the zero is implied."""
        return 0 if cls.zero is None or bits >= cls.code_bits else 2 ** (cls.code_bits - 1) - 2 ** (bits - 1)

    @classmethod
    def implied_zero(cls, bits: int) -> int | None:
        """The canonical code of `bits` that stands for weight 0, or None where each block carries its own min."""
        return None if cls.zero is None else cls.zero - cls.shift(bits)

    @classmethod
    def native(cls) -> tuple[int, int]:
        """(bits, group_size) of a matrix in these blocks that nobody declared."""
        group = cls.grid.group_size if isinstance(cls.grid, SuperBlockGrid) else cls.block_size
        return cls.bits[-1], group

    @classmethod
    def holds_all(cls, bits: int) -> bool:
        """Whether every matrix of that many bits is exactly in this type, whatever its values."""
        return cls.zero is None and bits in cls.bits and bits <= cls.code_bits

    @classmethod
    def _beyond(cls, codes: NDArray[np.uint8], bits: int) -> int | None:
        """The worst of codes (out, in·bits/8), packed at `bits`, that is not among first … first + 2^code_bits − 1."""
        if bits <= cls.code_bits and not cls.first:
            return None
        unpacked = unpack_codes(codes, bits)
        low, high = int(unpacked.min()), int(unpacked.max())
        if low < cls.first:
            return low
        return high if high >= cls.first + 2**cls.code_bits else None

    @classmethod
    def holds(cls, matrix: PackedAffine) -> bool:
        """Whether this very matrix is exactly in this type: its codes fit, and so does its offset (−0 equals 0)."""
        if matrix.grid != cls.grid:
            return False
        if cls.holds_all(matrix.bits):
            return True
        if matrix.bits not in cls.bits:
            return False
        zero = cls.implied_zero(matrix.bits)
        if zero is not None and not np.array_equal(matrix.offset, implied_offset(matrix.scale, zero)):
            return False
        return cls._beyond(matrix.codes, matrix.bits) is None

    @classmethod
    def pack(cls, matrix: PackedAffine) -> NDArray[np.uint8]:
        """Rows of blocks (out, in/32 · block_bytes) uint8; d and m are repeated when a group spans several blocks.

        Codes and scale are held exactly, and so is the offset where blocks carry it; elsewhere the caller sees to the
        difference (`holds`, or layout "split"). Raises InputError for other bits, smaller groups and larger codes.
        """
        if matrix.grid != cls.grid:
            raise InputError(f"a matrix on grid {matrix.grid.name} does not go into {cls.name}")
        check_group(matrix.group_size, where=cls.name)
        if matrix.bits not in cls.bits:
            raise InputError(f"{matrix.bits}-bit codes do not go into {cls.name}", why=f"it holds {cls.bits} bits")
        blocks = np.empty((matrix.shape[0], matrix.shape[1] // QK), cls.layout)
        blocks["d"] = _per_block(matrix.scale, matrix.group_size)
        if cls.zero is None:
            blocks["m"] = _per_block(matrix.offset, matrix.group_size)
        for rows in slabs(matrix.codes):
            cls.put_codes(blocks[rows], cls._carried(matrix.codes[rows], matrix.bits))
        return blocks.view(np.uint8)

    @classmethod
    def _carried(cls, codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
        """Canonical codes packed at `bits` -> those of the blocks, packed at `carrier`."""
        codes = _repacked(codes, bits, cls.carrier)
        if (code := cls._beyond(codes, cls.carrier if bits > cls.code_bits else bits)) is not None:
            last = cls.first + 2**cls.code_bits - 1
            raise InputError(f"code {code} does not fit in {cls.name}", why=f"it holds {cls.first} to {last}")
        if shift := cls.shift(bits):
            codes = pack_codes(unpack_codes(codes, cls.carrier) + np.uint8(shift), cls.carrier)
        return codes

    @classmethod
    def unpack(cls, rows: NDArray[np.uint8], *, bits: int, group_size: int) -> PackedAffine:
        """The inverse of pack; offset = −zero·s where the zero is implied.

        bits and group_size are what the writer declared: UnsafeInputError when the blocks contradict them or hold NaN,
        InputError when the implied offset overflows fp16.
        """
        check_group(group_size, where="declared by the file")
        if bits not in cls.bits:
            raise UnsafeInputError(f"{bits}-bit codes declared for {cls.name}", why=f"it holds {cls.bits} bits")
        blocks = np.ascontiguousarray(rows).view(cls.layout)
        scale = _grouped(blocks["d"], group_size, "scale")
        zero = cls.implied_zero(bits)
        offset = _grouped(blocks["m"], group_size, "offset") if zero is None else _implied(scale, zero)
        try:
            codes = np.empty((len(blocks), packed_width(blocks.shape[1] * QK, bits)), np.uint8)
            for part in slabs(codes):
                codes[part] = _unshifted(cls.take_codes(blocks[part]), cls.carrier, cls.shift(bits), bits)
            return PackedAffine(codes, scale, offset, bits, group_size)
        except InputError as error:
            raise UnsafeInputError(error.what, why="the blocks hold no canonical numbers") from error


def swapped(
    low: NDArray[np.uint64], high: NDArray[np.uint64], mask: np.uint64, shift: np.uint64
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The bits of `low` that lie `shift` above `mask` and those of `high` in `mask` change places. Its own inverse."""
    moved = low >> shift
    moved ^= high
    moved &= mask
    upper = high ^ moved
    moved <<= shift
    moved ^= low
    return moved, upper


def interleaved(even: NDArray[np.uint64], odd: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """The bytes of two arrays in turn."""
    both = odd.view(np.uint8).astype("<u2")
    both <<= EIGHT
    both |= even.view(np.uint8)
    return both


def slabs(codes: NDArray[np.uint8]) -> Iterator[slice]:
    """Rows of packed codes (rows, bytes), SLAB_BYTES at a time."""
    return row_blocks(len(codes), codes.nbytes, SLAB_BYTES)


def check_group(group_size: int, *, where: str) -> None:
    """GGUF blocks cover 32 in-features, so smaller groups do not fit. Raises InputError."""
    if group_size % QK:
        raise InputError(
            f"group size {group_size} does not fit GGUF blocks of {QK}",
            where=where,
            fix="quantize with group_size 32, 64 or 128, or export to ONNX",
        )


def _per_block(values: NDArray[np.float16], group_size: int) -> NDArray[np.uint16]:
    """fp16 (out, in/g) -> its bit patterns, one per block (out, in/32)."""
    patterns = values.view("<u2")
    return patterns if group_size == QK else np.repeat(patterns, group_size // QK, axis=1)


def _grouped(per_block: NDArray[np.uint16], group_size: int, what: str) -> NDArray[np.float16]:
    """Bit patterns per block (out, in/32) -> fp16 (out, in/g), after checking that the blocks of a group agree."""
    span = group_size // QK
    if per_block.shape[1] % span:
        raise UnsafeInputError(f"{per_block.shape[1]} blocks do not divide into groups of {group_size}")
    groups = per_block.reshape(per_block.shape[0], -1, span)
    if span > 1 and not (groups == groups[..., :1]).all():
        raise UnsafeInputError(f"blocks of one group disagree about its {what}", why=f"declared group {group_size}")
    return np.ascontiguousarray(groups[..., 0]).view("<f2").astype(np.float16, copy=False)


def _repacked(codes: NDArray[np.uint8], bits: int, target: int) -> NDArray[np.uint8]:
    """Packed codes at another width. Raises InputError when one does not fit."""
    return codes if bits == target else pack_codes(unpack_codes(codes, bits), target)


def _unshifted(codes: NDArray[np.uint8], carrier: int, shift: int, bits: int) -> NDArray[np.uint8]:
    """Codes packed at `carrier` bits, minus `shift`, packed at `bits`. Raises InputError when one does not fit."""
    if not shift:
        return _repacked(codes, carrier, bits)
    unpacked = unpack_codes(codes, carrier)
    if unpacked.min() < shift:
        raise InputError(f"code {unpacked.min()} is below {shift}, where {bits}-bit codes begin")
    return pack_codes(unpacked - np.uint8(shift), bits)


def _implied(scale: NDArray[np.float16], zero: int) -> NDArray[np.float16]:
    offset = implied_offset(scale, zero)
    if np.isinf(offset).any() and np.isfinite(scale).all():
        raise InputError(f"−{zero}·scale overflows fp16", why=f"a scale exceeds {65504 / zero:g}")
    return offset
