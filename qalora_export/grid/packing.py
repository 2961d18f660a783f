"""Packed codes: the byte layout of codes on disk and on the device.

Row by row, least significant bit first: code i of a row occupies bits [i·b, (i+1)·b) of the row's bit string, and
bit k of the string is bit k % 8 of byte k // 8. So at 4 bits byte j holds code 2j (low nibble) and 2j+1 (high); at
3, 5 and 6 bits eight codes fill so many bytes. A row always fills whole bytes because in-features are a multiple of 16.
"""

import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError

NIBBLE, TWO_NIBBLES = np.uint16(4), np.uint16(0x0F0F)
SLAB = 1 << 14  # words of eight codes that are worked on at a time: what is made of them stays in a core's cache


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
    spread = _padded(codes, -codes.size % 8).view("<u8")
    packed = np.empty(spread.size, f"V{bits}")  # the low bytes of each word; opaque items move several times faster
    for part in _slabs(spread.size):
        packed[part] = np.ndarray(packed[part].shape, packed.dtype, _gathered(spread[part], bits), strides=(8,))
    return packed.view(np.uint8)[: out * width].reshape(out, width)


def unpack_codes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(out, in·bits/8) uint8 -> (out, in) uint8; the inverse of pack_codes."""
    if bits == 8:
        return np.ascontiguousarray(packed)
    out, codes = packed.shape[0], packed.size * 8 // bits
    if bits == 4:  # one byte becomes a word: 0xHL -> 0x0H0L
        words = packed.astype("<u2")
        words |= words << NIBBLE
        words &= TWO_NIBBLES
        return np.ascontiguousarray(words).view(np.uint8)
    padded = _padded(packed, 8)  # so that the last run can be read as a word too
    runs = np.ndarray((-(-codes // 8),), "<u8", padded, strides=(bits,))  # of eight codes, and what follows them
    spread = np.empty(runs.shape, "<u8")
    for part in _slabs(runs.size):
        spread[part] = _spread(runs[part].copy(), bits)
    return spread.view(np.uint8)[:codes].reshape(out, -1)


def _padded(values: NDArray[np.uint8], zeros: int) -> NDArray[np.uint8]:
    """All bytes one after the other, and zeros behind them."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return np.concatenate([flat, np.zeros(zeros, np.uint8)]) if zeros else flat


def _slabs(words: int) -> Iterator[slice]:
    return (slice(start, start + SLAB) for start in range(0, words, SLAB))


def _spread(words: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Eight codes in the low 8·bits bits of every word, in place -> one in each byte: halves, quarters, codes part."""
    for high, low, shift in reversed(_moves(bits)):
        upper = words & (high >> shift)
        upper <<= shift
        words &= low
        words |= upper
    return words


def _gathered(words: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """The inverse of _spread, into new words: neighbours first, then pairs of them, then halves."""
    gathered = words.copy()
    for high, low, shift in _moves(bits):
        upper = gathered & high
        upper >>= shift
        gathered &= low
        gathered |= upper
    return gathered


@functools.cache
def _moves(bits: int) -> tuple[tuple[np.uint64, np.uint64, np.uint64], ...]:
    """(upper fields, lower fields, how far upper ones move down) for fields of one, two and four codes in a word."""
    found = []
    for count in (1, 2, 4):
        field, lane = (1 << count * bits) - 1, 8 * count
        low = sum(field << place for place in range(0, 64, 2 * lane))
        found.append((np.uint64(low << lane), np.uint64(low), np.uint64(count * (8 - bits))))
    return tuple(found)
