"""GGUF's symmetric type in super-blocks of 256 in-features: grid q6_k, byte for byte.

Sources: ggml/src/ggml-common.h (block_q6_K), ggml-quants.c (dequantize_row_q6_K).
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.formats.gguf.block_type import FOUR, LOW
from qalora_export.formats.gguf.super_blocks import TWO, SuperBlockType, lanes, side_by_side
from qalora_export.grid import AnyLevels, SymmetricLevels, pack_codes, unpack_codes
from qalora_export.grid.named import Q6_K as Q6_K_GRID

PAIRS = [np.uint64(0x0303030303030303 << 2 * lane) for lane in range(4)]  # two bits of every byte, by their place


class Q6_K(SuperBlockType):
    """w = d·k·(q − 32) for 16 groups of 16, k int8:

    0              128           192                 208      210 bytes
    │ ql: 128 bytes │ qh: 64 bytes │ scales: 16 × int8 │ d fp16 │

    ql       64 bytes for 128 elements: byte j of them = low 4 bits of element j | of element 64 + j << 4
    qh       32 bytes for 128 elements: byte j of them = high 2 bits of elements j, 32 + j, 64 + j, 96 + j, lowest first
    scales   byte j: k of group j
    """

    id, file_type, grid = 14, 18, Q6_K_GRID
    layout = np.dtype([("ql", "V128"), ("qh", "V64"), ("scales", "i1", 16), ("d", "<u2")])

    @classmethod
    def put_numbers(cls, blocks: NDArray[Any], levels: AnyLevels) -> None:
        blocks["scales"] = levels.scale.reshape(*blocks.shape, cls.grid.groups)

    @classmethod
    def levels(cls, blocks: NDArray[Any]) -> SymmetricLevels:
        step = np.ascontiguousarray(blocks["d"]).view("<f2").astype(np.float16)
        return SymmetricLevels(Q6_K_GRID, np.ascontiguousarray(blocks["scales"]).reshape(len(blocks), -1), step)

    @classmethod
    def put_codes(cls, blocks: NDArray[Any], codes: NDArray[np.uint8]) -> None:
        a, b, c, d = lanes(unpack_codes(codes, 6), 4)  # 32 bytes of each half
        ql = side_by_side([a & LOW | (c & LOW) << FOUR, b & LOW | (d & LOW) << FOUR])
        blocks["ql"] = ql.view("V128").reshape(blocks.shape)
        qh = a >> FOUR & PAIRS[0] | b >> TWO & PAIRS[1] | c & PAIRS[2] | d << TWO & PAIRS[3]
        blocks["qh"] = qh.view("V64").reshape(blocks.shape)

    @classmethod
    def take_codes(cls, blocks: NDArray[Any]) -> NDArray[np.uint8]:
        first, second = lanes(np.ascontiguousarray(blocks["ql"]), 2)
        qh = np.ascontiguousarray(blocks["qh"]).view("<u8").reshape(-1)
        a, b = first & LOW | (qh & PAIRS[0]) << FOUR, second & LOW | (qh & PAIRS[1]) << TWO
        c, d = first >> FOUR & LOW | qh & PAIRS[2], second >> FOUR & LOW | (qh & PAIRS[3]) >> TWO
        return pack_codes(side_by_side([a, b, c, d]).reshape(len(blocks), -1), 6)

    @classmethod
    def slow_unpack(cls, block: bytes) -> tuple[list[int], list[float], list[float]]:
        ql, qh, *numbers = block[:128], block[128:192], *struct.unpack_from("<16be", block, 192)
        codes = []
        for e in range(256):
            half, lane, byte = e // 128, e % 128 // 32, e % 32
            nibble = ql[64 * half + 32 * (lane % 2) + byte] >> (4 * (lane // 2)) & 15
            codes.append(nibble | (qh[32 * half + byte] >> (2 * lane) & 3) << 4)
        scales = [numbers[16] * k for k in numbers[:16]]
        return codes, scales, [-32 * scale for scale in scales]
