"""The exact split form of a quantized linear (DESIGN.md, "ONNX split form"): numbers and byte layout, numpy only.

    y = MatMulNBits(x; codes, s, zero z) + GroupSum_g(x) · Rᵀ        z = the code nearest to weight 0, R = m + z·s

    w = s·q + m = s·(q − z) + R : s·(q − z) is exact in float32 (11 + 8 bits), and so is R by the choice of z, so the
    one rounding is that of the sum, and the dequantized weight is the canonical one to 0 ulp.

On a grid of super-blocks s and m are float32 products of 17 bits: s·(q − z) has 21, and R is checked to be a float32 as
ever.

Every group has its own integer z. The kernel rounds activations to int8 and the second branch does not, so the noise of
a layer is that of s·(q − z): least where the two nearly cancel R, that is for z next to −m/s.

MatMulNBits (com.microsoft, ContribOperators.md) takes B as uint8 (out, in/g, g·b/8), element i of a block at bits
[i·b, (i+1)·b) of the block, least significant first. That is grid.packing's own order, so 2-, 4- and 8-bit codes go
across byte for byte; 3-bit codes travel in 4-bit containers, those of 5 and 6 bits in bytes. Without zero_points z is
2^(b−1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.grid import differing, fp16_is_finite, implied_offset, pack_codes, unpack_codes

CONTAINER_BITS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}  # code bits -> bits of one MatMulNBits element


@dataclass(frozen=True, slots=True)
class SplitForm:
    """How one matrix is written.

    container: bits per element in the file. zero: z, uint8 (out, in/g). remainder: R (out, in/g), float16 where that
    holds every one of them and else float32; None where m is −z·s everywhere, so that R is 0. moved: groups whose z is
    0 because R of the nearest code is no float32.
    """

    bits: int
    container: int
    zero: NDArray[np.uint8]
    remainder: NDArray[np.float16] | NDArray[np.float32] | None
    moved: int

    @property
    def explicit_zero(self) -> bool:
        """Whether MatMulNBits needs a zero_points input."""
        return bool((self.zero != 1 << (self.container - 1)).any())


@dataclass(frozen=True, slots=True)
class WrittenForm:
    """What the report says of a form. container, moved: as in SplitForm; remainder: its dtype, or "" without one."""

    container: int
    remainder: str
    moved: int

    @classmethod
    def of(cls, form: SplitForm) -> WrittenForm:
        """Without the arrays, so that a model's forms can be kept."""
        return cls(form.container, "" if form.remainder is None else form.remainder.dtype.name, form.moved)


def choose_form(bits: int, scale: NDArray[Any], offset: NDArray[Any], *, where: str) -> SplitForm:
    """Pick z of every group and compute R; scale and offset are float16, or float32 products, (out, in/g).

    R is a multiple of 2^−24, so it is exact in float32 whenever |R| < 1, and where the range of the codes covers
    weight 0 it is even a float16: R and m are multiples of the spacing of s, and |R| ≤ s/2. A group with a large R and
    a tiny scale gets z = 0, where R = m. Raises InputError for NaN or infinity.
    """
    if not (_finite(scale) and _finite(offset)):
        raise InputError("a scale or offset is NaN or infinite", where=where, fix="quantize or merge again")
    zero = nearest_zero(bits, scale, offset)
    product = zero * scale.astype(np.float64)
    exact = offset + product  # 48 bits at most
    inexact = exact.astype(np.float32) != exact
    zero[inexact], product[inexact] = 0, 0
    exact = np.where(product == 0, offset, exact)  # m itself: −0 stays −0
    container = CONTAINER_BITS[bits]
    if not exact.any() and differing(_implied(scale, zero), offset) == 0:
        return SplitForm(bits, container, zero, None, int(inexact.sum()))
    return SplitForm(bits, container, zero, _narrow(exact.astype(np.float32)), int(inexact.sum()))


def nearest_zero(bits: int, scale: NDArray[Any], offset: NDArray[Any]) -> NDArray[np.uint8]:
    """z (out, in/g): the code whose weight is nearest to 0 (ties to even); the middle code where the scale is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.rint(-offset.astype(np.float64) / scale.astype(np.float64))
    wanted[scale == 0] = 2 ** (bits - 1)
    zero: NDArray[np.uint8] = np.clip(wanted, 0, 2**bits - 1).astype(np.uint8)
    return zero


def offset_of(
    scale: NDArray[Any], zero: NDArray[np.uint8], remainder: NDArray[Any] | None, *, where: object
) -> NDArray[Any]:
    """The inverse, m = R − z·s, in the dtype of the scale. Raises UnsafeInputError when that does not hold it."""
    if remainder is None:
        return _implied(scale, zero)
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale or remainder may be infinite; both are refused
        product = zero * scale.astype(np.float64)
        exact = np.where(product == 0, remainder, remainder.astype(np.float64) - product)  # R itself: −0 stays −0
        offset = exact.astype(scale.dtype)
    if not np.array_equal(offset.astype(np.float64), exact, equal_nan=True):
        raise UnsafeInputError(
            f"a remainder does not come from a {scale.dtype} offset", where=where, fix="export it again"
        )
    return offset


def _implied(scale: NDArray[Any], zero: NDArray[np.uint8]) -> NDArray[Any]:
    """−z·s in the dtype of the scale."""
    if scale.dtype == np.float16:
        return implied_offset(scale, zero)
    product: NDArray[np.float32] = -zero.astype(np.float32) * scale
    return product


def _finite(values: NDArray[Any]) -> bool:
    return fp16_is_finite(values) if values.dtype == np.float16 else bool(np.isfinite(values).all())


def _narrow(remainder: NDArray[np.float32]) -> NDArray[np.float16] | NDArray[np.float32]:
    """As float16 when no value changes, else as it is."""
    with np.errstate(over="ignore"):
        narrow = remainder.astype(np.float16)
    return narrow if np.array_equal(narrow.astype(np.float32), remainder) else remainder


def to_blocks(packed: NDArray[np.uint8], bits: int, groups: int) -> NDArray[np.uint8]:
    """Checkpoint bytes (out, in·bits/8) -> B of MatMulNBits (out, groups, g·container/8). A view where it can be."""
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


def zero_points(form: SplitForm) -> NDArray[np.uint8]:
    """The zero_points input: uint8 (out, ceil(groups·container/8)), element j of a row at bits [j·b, (j+1)·b)."""
    groups, per_byte = form.zero.shape[1], 8 // form.container
    padded = np.pad(form.zero, ((0, 0), (0, -groups % per_byte)))
    return pack_codes(padded, form.container)
