"""Packed codes: the byte layout of codes on disk and on the device.

Row by row, least significant bit first: code i of a row occupies bits [i·b, (i+1)·b) of the row's bit string, and
bit k of the string is bit k % 8 of byte k // 8. So at 4 bits byte j holds code 2j (low nibble) and 2j+1 (high); at
3 bits eight codes fill three bytes. A row always fills whole bytes because in-features are a multiple of 16.
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
    if bits == 3:
        words = codes.reshape(out, -1, 8).astype(np.uint32)  # (out, in/8, 8): 24 bits to a word
        word = np.bitwise_or.reduce(words << (3 * np.arange(8, dtype=np.uint32)), axis=-1)
        return np.stack([word & 255, (word >> 8) & 255, word >> 16], axis=-1).astype(np.uint8).reshape(out, width)
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
    if bits == 3:
        triple = packed.reshape(out, -1, 3).astype(np.uint32)
        word = triple[..., 0] | (triple[..., 1] << 8) | (triple[..., 2] << 16)
        return ((word[..., None] >> (3 * np.arange(8, dtype=np.uint32))) & 7).astype(np.uint8).reshape(out, -1)
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(out, -1)
