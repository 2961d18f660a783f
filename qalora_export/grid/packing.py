"""Packed codes: the byte layout of codes on disk and on the device.

Row by row, least significant bit first: code i of a row occupies bits [i·b, (i+1)·b) of the row's bit string, and
bit k of the string is bit k % 8 of byte k // 8. So at 4 bits byte j holds code 2j (low nibble) and 2j+1 (high); at
3, 5 and 6 bits eight codes fill so many bytes. A row always fills whole bytes because in-features are a multiple of 16.
"""

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError

NIBBLE, TWO_NIBBLES = np.uint16(4), np.uint16(0x0F0F)


def packed_width(in_features: int, bits: int) -> int:
    """Bytes per packed row."""
    if in_features * bits % 8:
        raise InputError(f"{in_features} codes of {bits} bits do not fill whole bytes")
    return in_features * bits // 8


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(out, in) uint8 codes -> (out, in·bits/8) uint8. Raises InputError if a code does not fit."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.size and int(codes.max()) >> bits:
        raise InputError(f"code {int(codes.max())} does not fit in {bits} bits")
    out, width = codes.shape[0], packed_width(codes.shape[1], bits)
    if bits == 4:  # two codes are the bytes of one word: 0x0H0L -> 0xHL
        words = np.ascontiguousarray(codes).view("<u2")
        pairs: NDArray[np.uint8] = (words | (words >> NIBBLE)).astype(np.uint8)
        return pairs
    if 8 % bits:
        runs = codes.reshape(out, -1, 8)
        word = np.zeros(runs.shape[:2], _word(bits))  # (out, in/8): a run of eight codes
        for lane in range(8):
            word |= runs[..., lane].astype(word.dtype) << word.dtype.type(bits * lane)
        return np.ascontiguousarray(word[..., None].view(np.uint8)[..., :bits]).reshape(out, width)
    lanes = codes.reshape(out, width, 8 // bits)
    packed = lanes[..., 0].copy()
    for lane in range(1, 8 // bits):
        packed |= lanes[..., lane] << np.uint8(bits * lane)
    return packed


def unpack_codes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(out, in·bits/8) uint8 -> (out, in) uint8; the inverse of pack_codes."""
    if bits == 8:
        return np.ascontiguousarray(packed)
    out = packed.shape[0]
    if bits == 4:  # one byte becomes a word: 0xHL -> 0x0H0L
        words = packed.astype("<u2")
        words |= words << NIBBLE
        words &= TWO_NIBBLES
        return np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits:
        runs = packed.reshape(out, -1, bits)
        wide = np.zeros((*runs.shape[:2], _word(bits).itemsize), np.uint8)
        wide[..., :bits] = runs
        word = wide.view(_word(bits))[..., 0]
        codes = np.empty((*runs.shape[:2], 8), np.uint8)
        for lane in range(8):
            codes[..., lane] = (word >> word.dtype.type(bits * lane)) & word.dtype.type(2**bits - 1)
        return codes.reshape(out, -1)
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(out, -1)


def _word(bits: int) -> np.dtype[np.unsignedinteger]:
    """The integer that holds eight codes, lowest byte first."""
    return np.dtype("<u4" if 8 * bits <= 32 else "<u8")
