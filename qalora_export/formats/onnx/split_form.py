"""The exact split form of a quantized linear (DESIGN.md, "ONNX split form"): numbers and byte layout, numpy only.

    y = MatMulNBits(x; codes, s, zero z) + GroupSum_g(x) · Rᵀ        R = m + z·s

    w = s·q + m = s·(q − z) + R : s·(q − z) is exact in float32 (11 + 8 bits), R is exact by the choice of z, so the one
    rounding is that of the sum, and the dequantized weight is the canonical one to 0 ulp.

MatMulNBits (com.microsoft, ContribOperators.md) takes B as uint8 (out, in/g, g·b/8), element i of a block at bits
[i·b, (i+1)·b) of the block, least significant first. That is grid.packing's own order, so 2-, 4- and 8-bit codes go
across byte for byte; 3-bit codes travel in 4-bit containers. Without zero_points z is 2^(b−1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.grid import fp16_is_finite, fp16_largest, implied_offset, pack_codes, unpack_codes

CONTAINER_BITS = {2: 2, 3: 4, 4: 4, 8: 8}  # code bits -> bits of one MatMulNBits element
MIN_BLOCK = 16  # MatMulNBits: block_size is a power of two, at least 16


@dataclass(frozen=True, slots=True)
class SplitForm:
    """How one matrix is written.

    container: bits per element in the file; zero: z; explicit_zero: MatMulNBits needs a zero_points input;
    has_remainder: the GroupSum branch is there (False for symmetric tensors, whose R is 0 everywhere).
    """

    bits: int
    container: int
    zero: int
    has_remainder: bool

    @property
    def explicit_zero(self) -> bool:
        return self.zero != 1 << (self.container - 1)


def choose_form(bits: int, scale: NDArray[np.float16], offset: NDArray[np.float16], *, where: str) -> SplitForm:
    """Pick z: the middle code 2^(bits−1), where int8 noise is least, unless R = m + z·s is not exact there.

    scale and offset are float16 (out, in/g). R is a multiple of 2^−24, so it is exact whenever |R| < 1; a tensor with
    a larger R and tiny scales may need z = 0, where R = m is exact always. Raises InputError for NaN or infinity.
    """
    if not (fp16_is_finite(scale) and fp16_is_finite(offset)):
        raise InputError("a scale or offset is NaN or infinite", where=where, fix="quantize or merge again")
    middle = 2 ** (bits - 1)
    container = CONTAINER_BITS[bits]
    if _is_symmetric(scale, offset, middle):
        return SplitForm(bits, container, middle, has_remainder=False)
    exact = remainder_is_exact(scale, offset, middle)
    return SplitForm(bits, container, middle if exact else 0, has_remainder=True)


def _is_symmetric(scale: NDArray[np.float16], offset: NDArray[np.float16], zero: int) -> bool:
    """offset == fp16(−zero·scale), bit for bit; the first row alone answers for most tensors that are not."""
    return all(
        np.array_equal(implied_offset(scale[rows], zero).view(np.uint16), offset[rows].view(np.uint16))
        for rows in (slice(1), slice(None))
    )


def remainder_is_exact(scale: NDArray[np.float16], offset: NDArray[np.float16], zero: int) -> bool:
    """True when float32(m) + z·float32(s) needs no rounding anywhere (float64 holds the sum exactly: 48 bits).

    Both terms are multiples of 2^−24, so a sum below 1 has at most 24 bits and is exact without looking further.
    """
    if fp16_largest(offset) + zero * fp16_largest(scale) < 1:
        return True
    exact = offset.astype(np.float64) + zero * scale.astype(np.float64)
    return bool(np.array_equal(exact.astype(np.float32).astype(np.float64), exact))


def to_blocks(packed: NDArray[np.uint8], bits: int, groups: int) -> NDArray[np.uint8]:
    """Checkpoint bytes (out, in·bits/8) -> B of MatMulNBits (out, groups, g·container/8). A view except for 3 bits."""
    container = CONTAINER_BITS[bits]
    if container != bits:
        packed = pack_codes(unpack_codes(packed, bits), container)
    return packed.reshape(packed.shape[0], groups, -1)


def from_blocks(blocks: NDArray[np.uint8], container: int) -> NDArray[np.uint8]:
    """B of MatMulNBits (out, groups, g·container/8) -> codes (out, in); written apart from grid.packing on purpose."""
    shifts = np.arange(0, 8, container, dtype=np.uint8)
    lanes = np.empty((*blocks.shape, len(shifts)), np.uint8)  # (out, groups, bytes, 8/container)
    for lane, shift in enumerate(shifts):
        np.bitwise_and(blocks >> shift, np.uint8(2**container - 1), out=lanes[..., lane])
    return lanes.reshape(blocks.shape[0], -1)


def zero_points(form: SplitForm, out: int, groups: int) -> NDArray[np.uint8]:
    """The zero_points input: uint8 (out, ceil(groups·container/8)), every element z."""
    per_byte = 8 // form.container
    pattern = sum(form.zero << (form.container * lane) for lane in range(per_byte))
    return np.full((out, -(-groups // per_byte)), pattern, np.uint8)
