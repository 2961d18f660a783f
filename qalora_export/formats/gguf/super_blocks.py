"""GGUF types in super-blocks of 256 in-features ("K-quants"): the grids of super-blocks, byte for byte.

Sources: ggml/src/ggml-common.h (block_q4_K, …), ggml-quants.c (get_scale_min_k4, dequantize_row_q4_K,
dequantize_row_q5_K, dequantize_row_q2_K).
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.gguf.block_type import EIGHT, FOUR, LOW, BlockType, interleaved, slabs, swapped
from qalora_export.grid import AnyLevels, Levels, PackedAffine, SuperBlockGrid, pack_codes, unpack_codes
from qalora_export.grid.named import Q2_K as Q2_K_GRID
from qalora_export.grid.named import Q4_K as Q4_K_GRID
from qalora_export.grid.named import Q5_K as Q5_K_GRID
from qalora_export.grid.named import SUPER_BLOCK

PAIRS, TWO = np.uint64(0x3333333333333333), np.uint64(2)  # two bits of every four
SIXTEEN, BYTES = np.uint32(16), np.uint64(0x0101010101010101)


class SuperBlockType(BlockType, abstract=True):
    """Blocks of 256: steps `d` and `dmin`, float16, levels of each group and codes.  w = d·k·q − dmin·l.

    layout: with `d` and, unless the grid is symmetric, `dmin`. A matrix is held, and exactly, when it is on this
    type's grid.
    """

    block_size = SUPER_BLOCK
    grid: ClassVar[SuperBlockGrid]

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        if not abstract:
            cls.code_bits, cls.bits = cls.grid.bits, (cls.grid.bits,)
        super().__init_subclass__(abstract=abstract)

    @classmethod
    def put_levels(cls, blocks: NDArray[Any], scale: NDArray[np.uint8], offset: NDArray[np.uint8]) -> None:
        """Write levels (rows, in/256, groups of a super-block) into the records (rows, in/256)."""
        raise NotImplementedError

    @classmethod
    def take_levels(cls, blocks: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The inverse."""
        raise NotImplementedError

    @classmethod
    def holds_all(cls, bits: int) -> bool:  # noqa: ARG003
        return False

    @classmethod
    def holds(cls, matrix: PackedAffine) -> bool:
        return matrix.grid == cls.grid

    @classmethod
    def pack(cls, matrix: PackedAffine) -> NDArray[np.uint8]:
        """Rows of blocks (out, in/256 · block_bytes) uint8. Raises InputError for a matrix on another grid."""
        levels = matrix.levels
        if levels is None or matrix.grid != cls.grid:
            raise InputError(f"a matrix on grid {matrix.grid.name} does not go into {cls.name}")
        blocks = np.empty(levels.scale_step.shape, cls.layout)
        blocks["d"] = levels.scale_step.view("<u2")
        cls.put_numbers(blocks, levels)
        for rows in slabs(matrix.codes):
            cls.put_codes(blocks[rows], matrix.codes[rows])
        return blocks.view(np.uint8)

    @classmethod
    def put_numbers(cls, blocks: NDArray[Any], levels: AnyLevels) -> None:
        """Write all but `d` and the codes into records (rows, in/256); levels: on this type's grid."""
        assert isinstance(levels, Levels)
        blocks["dmin"] = levels.offset_step.view("<u2")
        shape = (*blocks.shape, cls.grid.groups)
        cls.put_levels(blocks, levels.scale.reshape(shape), levels.offset.reshape(shape))

    @classmethod
    def unpack(cls, rows: NDArray[np.uint8], *, bits: int, group_size: int) -> PackedAffine:
        """The inverse of pack. Raises UnsafeInputError where blocks and declaration differ, or a step is not finite."""
        if (bits, group_size) != (cls.grid.bits, cls.grid.group_size):
            raise UnsafeInputError(f"{bits} bits in groups of {group_size} declared for {cls.name}")
        blocks = np.ascontiguousarray(rows).view(cls.layout)
        codes = np.empty((len(blocks), blocks.shape[1] * SUPER_BLOCK * bits // 8), np.uint8)
        for part in slabs(codes):
            codes[part] = cls.take_codes(blocks[part])
        try:
            return PackedAffine.on_levels(codes, cls.levels(blocks))
        except InputError as error:
            raise UnsafeInputError(error.what, why="the blocks hold no canonical numbers") from error

    @classmethod
    def levels(cls, blocks: NDArray[Any]) -> AnyLevels:
        """Levels and steps of records (rows, in/256). Raises InputError for a step that is not finite."""
        scale, offset = (level.reshape(len(blocks), -1) for level in cls.take_levels(blocks))
        steps = (np.ascontiguousarray(blocks[part]).view("<f2").astype(np.float16) for part in ("d", "dmin"))
        return Levels(cls.grid, scale, offset, *steps)


class _SixBitLevels(SuperBlockType, abstract=True):
    """Eight pairs of levels of 6 bits in the 12 bytes `scales`:

    bytes 0–3: k of groups 0–3, bytes 4–7: l of groups 0–3, each in the low 6 bits; byte 8 + j: low 4 bits of k and of l
    of group 4 + j; their high 2 bits are those of bytes j and 4 + j
    """

    @classmethod
    def put_levels(cls, blocks: NDArray[Any], scale: NDArray[np.uint8], offset: NDArray[np.uint8]) -> None:
        put_six_bits(blocks["scales"], scale, offset)

    @classmethod
    def take_levels(cls, blocks: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return take_six_bits(blocks["scales"])


class Q4_K(_SixBitLevels):
    """w = d·k·q − dmin·l for 8 groups of 32, k and l of 6 bits:

    0        2           4                16                                                  144 bytes
    │ d fp16 │ dmin fp16 │ scales: 12 u8  │ qs: 128 bytes                                       │

    qs       32 bytes for two groups: byte j of them = element j of the first | element j of the second << 4
    """

    id, file_type, grid = 12, 15, Q4_K_GRID
    layout = np.dtype([("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", 12), ("qs", "V128")])

    @classmethod
    def put_codes(cls, blocks: NDArray[Any], codes: NDArray[np.uint8]) -> None:
        # As words of eight bytes: packed codes 2j | 2j+1 << 4 of the first group in a, of the second in b.
        pairs = np.ascontiguousarray(codes).view("V16").reshape(-1, 2)
        a, b = (np.ascontiguousarray(pairs[:, group]).view("<u8") for group in (0, 1))
        blocks["qs"] = interleaved(*swapped(a, b, LOW, FOUR)).view("V128").reshape(blocks.shape)

    @classmethod
    def take_codes(cls, blocks: NDArray[Any]) -> NDArray[np.uint8]:
        both = np.ascontiguousarray(blocks["qs"]).view("<u2").reshape(-1)
        even, odd = both.astype(np.uint8).view("<u8"), (both >> EIGHT).astype(np.uint8).view("<u8")
        pairs = np.empty((even.size // 2, 2), "V16")
        a, b = swapped(even, odd, LOW, FOUR)
        pairs[:, 0], pairs[:, 1] = a.view("V16"), b.view("V16")
        return pairs.view(np.uint8).reshape(len(blocks), -1)

    @classmethod
    def slow_unpack(cls, block: bytes) -> tuple[list[int], list[float], list[float]]:
        d, dmin = struct.unpack_from("<ee", block)
        pairs = slow_six_bits(block[4:16])
        codes: list[int] = []
        for chunk in range(4):
            qs = block[16 + 32 * chunk : 48 + 32 * chunk]
            codes += [byte & 15 for byte in qs] + [byte >> 4 for byte in qs]
        return codes, [d * k for k, _ in pairs], [-dmin * level for _, level in pairs]


class Q5_K(_SixBitLevels):
    """w = d·k·q − dmin·l for 8 groups of 32, k and l of 6 bits:

    0        2           4                16             48                             176 bytes
    │ d fp16 │ dmin fp16 │ scales: 12 u8  │ qh: 32 bytes │ qs: 128 bytes                 │

    qh       bit g of byte j = bit 4 of element j of group g
    qs       the low 4 bits of all elements, as in Q4_K
    """

    id, file_type, grid = 13, 17, Q5_K_GRID
    layout = np.dtype([("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", 12), ("qh", "V32"), ("qs", "V128")])

    @classmethod
    def put_codes(cls, blocks: NDArray[Any], codes: NDArray[np.uint8]) -> None:
        groups = lanes(unpack_codes(codes, 5), 8)
        nibbles = [even & LOW | (odd & LOW) << FOUR for even, odd in zip(groups[::2], groups[1::2], strict=True)]
        blocks["qs"] = side_by_side(nibbles).view("V128").reshape(blocks.shape)
        high = np.zeros_like(groups[0])
        for bit, group in enumerate(groups):
            high |= (group >> FOUR & BYTES) << np.uint64(bit)
        blocks["qh"] = high.view("V32").reshape(blocks.shape)

    @classmethod
    def take_codes(cls, blocks: NDArray[Any]) -> NDArray[np.uint8]:
        nibbles = lanes(np.ascontiguousarray(blocks["qs"]), 4)
        high = np.ascontiguousarray(blocks["qh"]).view("<u8").reshape(-1)
        groups = []
        for group in range(8):
            low = nibbles[group // 2] >> np.uint64(4 * (group % 2)) & LOW
            groups.append(low | (high >> np.uint64(group) & BYTES) << FOUR)
        return pack_codes(side_by_side(groups).reshape(len(blocks), -1), 5)

    @classmethod
    def slow_unpack(cls, block: bytes) -> tuple[list[int], list[float], list[float]]:
        d, dmin = struct.unpack_from("<ee", block)
        pairs, qh, qs = slow_six_bits(block[4:16]), block[16:48], block[48:]
        codes = []
        for group in range(8):
            for j in range(32):
                nibble = qs[32 * (group // 2) + j] >> (4 * (group % 2)) & 15
                codes.append(nibble | (qh[j] >> group & 1) << 4)
        return codes, [d * k for k, _ in pairs], [-dmin * level for _, level in pairs]


class Q2_K(SuperBlockType):
    """w = d·k·q − dmin·l for 16 groups of 16, k and l of 4 bits:

    0                  16            80       82                                               84 bytes
    │ scales: 16 bytes │ qs: 64 bytes │ d fp16 │ dmin fp16 │

    scales   byte j: k of group j | l of group j << 4
    qs       32 bytes for 128 elements: byte j of them = elements j, 32 + j, 64 + j, 96 + j, two bits each, lowest first
    """

    id, file_type, grid = 10, 10, Q2_K_GRID
    layout = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<u2"), ("dmin", "<u2")])

    @classmethod
    def put_codes(cls, blocks: NDArray[Any], codes: NDArray[np.uint8]) -> None:
        # As words of eight bytes, each 32 codes: element 4i + r of all four lanes is in byte i of word r afterwards.
        lanes = np.ascontiguousarray(codes).view("<u8").reshape(-1, 4).T
        first, second, third, fourth = _exchanged(*lanes)
        low, high = interleaved(first, second), interleaved(third, fourth)
        qs = high.astype("<u4") << SIXTEEN
        qs |= low
        blocks["qs"] = qs.view(np.uint8).reshape(*blocks.shape, 64)

    @classmethod
    def take_codes(cls, blocks: NDArray[Any]) -> NDArray[np.uint8]:
        qs = np.ascontiguousarray(blocks["qs"]).view("<u4").reshape(-1)
        words = _exchanged(*((qs >> np.uint32(8 * place)).astype(np.uint8).view("<u8") for place in range(4)))
        return np.stack(words, axis=-1).view(np.uint8).reshape(len(blocks), -1)

    @classmethod
    def put_levels(cls, blocks: NDArray[Any], scale: NDArray[np.uint8], offset: NDArray[np.uint8]) -> None:
        blocks["scales"] = scale | offset << np.uint8(4)

    @classmethod
    def take_levels(cls, blocks: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return blocks["scales"] & np.uint8(15), blocks["scales"] >> np.uint8(4)

    @classmethod
    def slow_unpack(cls, block: bytes) -> tuple[list[int], list[float], list[float]]:
        d, dmin = struct.unpack_from("<ee", block, 80)
        codes = [
            block[16 + 32 * half + byte] >> 2 * lane & 3 for half in range(2) for lane in range(4) for byte in range(32)
        ]
        return codes, [d * (byte & 15) for byte in block[:16]], [-dmin * (byte >> 4) for byte in block[:16]]


def _exchanged(
    a: NDArray[np.uint64], b: NDArray[np.uint64], c: NDArray[np.uint64], d: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], ...]:
    """Of four words w: field j of two bits in every byte of w[i] and field i of that byte of w[j] change places.

    A transpose by halves (Hacker's Delight, 7-3): neighbours first, then pairs of them. It is its own inverse.
    """
    (a, b), (c, d) = swapped(a, b, PAIRS, TWO), swapped(c, d, PAIRS, TWO)
    (a, c), (b, d) = swapped(a, c, LOW, FOUR), swapped(b, d, LOW, FOUR)
    return a, b, c, d


def lanes(rows: NDArray[Any], count: int) -> list[NDArray[np.uint64]]:
    """Bytes in runs of 32, `count` after another -> of each place in those the runs, as words of eight bytes."""
    runs = rows.view("V32").reshape(-1, count)  # opaque items move several times faster
    return [np.ascontiguousarray(runs[:, place]).view("<u8") for place in range(count)]


def side_by_side(words: list[NDArray[np.uint64]]) -> NDArray[np.uint8]:
    """The inverse of `lanes`: all bytes."""
    runs = np.empty((words[0].size // 4, len(words)), "V32")
    for place, lane in enumerate(words):
        runs[:, place] = lane.view("V32")
    return runs.view(np.uint8).reshape(-1)


def put_six_bits(packed: NDArray[np.uint8], k: NDArray[np.uint8], levels: NDArray[np.uint8]) -> None:
    """Eight pairs (k, l) of 6 bits, (…, 8) each, into 12 bytes, (…, 12), as get_scale_min_k4 reads them."""
    high, low, two, four = np.uint32(0x30303030), np.uint32(0x0F0F0F0F), np.uint32(2), np.uint32(4)
    words = np.empty((*k.shape[:-1], 3), "<u4")  # four bytes at a time
    (first_k, last_k), (first, last) = (np.ascontiguousarray(x).view("<u4").reshape(-1, 2).T for x in (k, levels))
    flat = words.reshape(-1, 3)
    flat[:, 0] = first_k | (last_k & high) << two
    flat[:, 1] = first | (last & high) << two
    flat[:, 2] = (last_k & low) | (last & low) << four
    packed[...] = words.view(np.uint8)


def take_six_bits(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The inverse of put_six_bits."""
    six, low, four = np.uint32(0x3F3F3F3F), np.uint32(0x0F0F0F0F), np.uint32(4)
    top, six_four = np.uint32(0x30303030), np.uint32(2)
    first, second, third = np.ascontiguousarray(packed).view("<u4").reshape(-1, 3).T
    k, levels = np.empty((2, len(first), 2), "<u4")
    k[:, 0], k[:, 1] = first & six, (third & low) | (first >> six_four) & top
    levels[:, 0], levels[:, 1] = second & six, (third >> four) & low | (second >> six_four) & top
    shape = (*packed.shape[:-1], 8)
    return k.view(np.uint8).reshape(shape), levels.view(np.uint8).reshape(shape)


def slow_six_bits(packed: bytes) -> list[tuple[int, int]]:
    """get_scale_min_k4 of all eight groups: the oracle of tests."""
    pairs = []
    for j in range(8):
        if j < 4:
            pairs.append((packed[j] & 63, packed[j + 4] & 63))
        else:
            pairs.append(
                ((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4, (packed[j + 4] >> 4) | (packed[j] >> 6) << 4)
            )
    return pairs
