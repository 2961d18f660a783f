"""Packed 4-bit codes ↔ the nibble order of GGUF's 4-bit blocks, 16 codes to a machine word.

Source (grid.packing): byte k of the 16 bytes of 32 codes = element 2k | element 2k+1 << 4.
Destination (ggml-common.h): byte j = element j | element j+16 << 4.

With a = bytes 0..7 and b = bytes 8..15 as words, the even destination bytes are the low nibbles of a beside those of
b, the odd ones the high nibbles. A rearrangement of nibbles, hence lossless; blocks.py has the slow, obvious form.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0)
FOUR, EIGHT = np.uint64(4), np.uint16(8)
HALF = 16  # bytes of 32 codes


def to_block_order(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Packed codes (rows, in/2) uint8 -> (rows · in/32, 16) uint8, the `qs` of every block."""
    words = np.ascontiguousarray(packed).reshape(-1).view("<u8").reshape(-1, 2)
    a, b = words[:, 0], words[:, 1]
    even = (a & LOW) | ((b & LOW) << FOUR)
    odd = ((a >> FOUR) & LOW) | (b & HIGH)
    both = odd.view(np.uint8).astype("<u2") << EIGHT
    both |= even.view(np.uint8)
    return both.view(np.uint8).reshape(-1, HALF)


def from_block_order(qs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`qs` of consecutive blocks (n, 16) uint8 -> packed codes (n, 16) uint8; the inverse of to_block_order."""
    both = np.ascontiguousarray(qs).reshape(-1).view("<u2")
    even, odd = both.astype(np.uint8).view("<u8"), (both >> EIGHT).astype(np.uint8).view("<u8")
    words = np.empty((even.size, 2), "<u8")
    words[:, 0] = (even & LOW) | ((odd & LOW) << FOUR)
    words[:, 1] = ((even >> FOUR) & LOW) | (odd & HIGH)
    return words.view(np.uint8).reshape(-1, HALF)
