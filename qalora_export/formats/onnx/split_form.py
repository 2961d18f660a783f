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
from qalora_export.formats.exact_sum import exact_sum
from qalora_export.formats.streaming import row_blocks
from qalora_export.grid import differing, fp16_is_finite, implied_offset, pack_codes, unpack_codes

SLAB_BYTES = 32 << 10  # of scales or codes that are worked on at a time: what is made of them stays in a core's cache
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
    container, implied, moved = CONTAINER_BITS[bits], True, 0
    zero = np.empty(scale.shape, np.uint8)
    rest, half = np.empty(scale.shape, np.float32), np.empty(scale.shape, np.float16)
    narrow = True
    for rows in row_blocks(len(scale), scale.nbytes, SLAB_BYTES):
        zero[rows], rest[rows], count = _split(bits, scale[rows], offset[rows])
        moved += count
        implied = implied and not rest[rows].any() and not differing(_implied(scale[rows], zero[rows]), offset[rows])
        narrow = narrow and _narrow(rest[rows], half[rows])
    remainder = None if implied else half if narrow else rest
    return SplitForm(bits, container, zero, remainder, moved)


def _split(bits: int, scale: NDArray[Any], offset: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.float32], int]:
    """z and R, and how many z had to be 0 for R to be a float32."""
    s, m = _widened(scale), _widened(offset)
    zero = nearest_zero(bits, s, m)
    product = zero.astype(s.dtype) * s
    rest, inexact = exact_sum(m, product)
    if moved := int(np.count_nonzero(inexact)):
        zero[inexact], product[inexact] = 0, 0
    np.copyto(rest, m, where=product == 0, casting="same_kind")  # m itself: −0 stays −0
    return zero, rest, moved


def _widened(values: NDArray[Any]) -> NDArray[Any]:
    """float16 as float32, in which z·s of float16 numbers is exact and a quotient of them is rounded to the same
    integer as in any wider float (next to a half they are 2^−13 apart from it or equal to it); float32 as float64.
    """
    return values.astype(np.float32 if values.dtype == np.float16 else np.float64)


def nearest_zero(bits: int, scale: NDArray[Any], offset: NDArray[Any]) -> NDArray[np.uint8]:
    """z (out, in/g): the code whose weight is nearest to 0 (ties to even); the middle code where the scale is 0.

    scale, offset: float32 that come from float16, or float64.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.rint(-offset / scale)
    np.copyto(wanted, 2 ** (bits - 1), where=scale == 0)
    zero: NDArray[np.uint8] = np.clip(wanted, 0, 2**bits - 1).astype(np.uint8)
    return zero


def offset_of(
    scale: NDArray[Any], zero: NDArray[np.uint8], remainder: NDArray[Any] | None, *, where: object
) -> NDArray[Any]:
    """The inverse, m = R − z·s, in the dtype of the scale. Raises UnsafeInputError when that does not hold it."""
    if remainder is None:
        return _implied(scale, zero)
    offset = np.empty(scale.shape, scale.dtype)
    for rows in row_blocks(len(scale), scale.nbytes, SLAB_BYTES):
        if not _offset(scale[rows], zero[rows], remainder[rows], offset[rows]):
            raise UnsafeInputError(
                f"a remainder does not come from a {scale.dtype} offset", where=where, fix="export it again"
            )
    return offset


def _offset(scale: NDArray[Any], zero: NDArray[np.uint8], remainder: NDArray[Any], out: NDArray[Any]) -> bool:
    """Write R − z·s; False when the dtype of `out` does not hold it."""
    s, rest = _widened(scale), remainder.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale or remainder may be infinite; both are refused
        product = zero.astype(s.dtype) * s
        exact, inexact = exact_sum(rest.astype(s.dtype), -product)
        at_zero = product == 0
        np.copyto(exact, rest, where=at_zero)  # R itself: −0 stays −0
        inexact &= ~at_zero
        out[:] = exact
        return not inexact.any() and np.array_equal(out.astype(np.float32), exact)


def _implied(scale: NDArray[Any], zero: NDArray[np.uint8]) -> NDArray[Any]:
    """−z·s in the dtype of the scale."""
    if scale.dtype == np.float16:
        return implied_offset(scale, zero)
    product: NDArray[np.float32] = -zero.astype(np.float32) * scale
    return product


def _finite(values: NDArray[Any]) -> bool:
    return fp16_is_finite(values) if values.dtype == np.float16 else bool(np.isfinite(values).all())


def _narrow(remainder: NDArray[np.float32], half: NDArray[np.float16]) -> bool:
    """Write the remainder as float16; False when a value changes."""
    with np.errstate(over="ignore"):
        half[:] = remainder
    return np.array_equal(half.astype(np.float32), remainder)


def to_blocks(packed: NDArray[np.uint8], bits: int, groups: int) -> NDArray[np.uint8]:
    """Checkpoint bytes (out, in·bits/8) -> B of MatMulNBits (out, groups, g·container/8). A view where it can be."""
    container = CONTAINER_BITS[bits]
    if container == bits:
        return packed.reshape(len(packed), groups, -1)
    carried = np.empty((len(packed), packed.shape[1] // bits * container), np.uint8)
    for rows in row_blocks(len(packed), packed.nbytes, SLAB_BYTES):
        carried[rows] = pack_codes(unpack_codes(packed[rows], bits), container)
    return carried.reshape(len(packed), groups, -1)


def from_blocks(blocks: NDArray[np.uint8], container: int) -> NDArray[np.uint8]:
    """B of MatMulNBits (out, groups, g·container/8) -> codes (out, in); written apart from grid.packing on purpose."""
    lanes = 8 // container
    word, ones = np.dtype(f"<u{lanes}"), np.uint8(2**container - 1)
    codes = (blocks & ones).astype(word)
    for lane in range(1, lanes):  # element `lane` of every byte becomes byte `lane` of a word
        codes |= (blocks >> np.uint8(lane * container) & ones).astype(word) << word.type(8 * lane)
    return codes.view(np.uint8).reshape(blocks.shape[0], -1)


def zero_points(form: SplitForm) -> NDArray[np.uint8]:
    """The zero_points input: uint8 (out, ceil(groups·container/8)), element j of a row at bits [j·b, (j+1)·b)."""
    groups, per_byte = form.zero.shape[1], 8 // form.container
    padded = np.pad(form.zero, ((0, 0), (0, -groups % per_byte)))
    return pack_codes(padded, form.container)
