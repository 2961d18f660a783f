"""What a runtime's matrix product documents that it computes, in float64. numpy only.

A kernel first rounds its input x to x̂ (int8 blocks, float16, …) and then multiplies x̂ with the weights of the file. The
rounding is exact arithmetic that can be repeated bit for bit; integers are summed exactly inside a block; what is left
is the float32 sum over blocks, whose order is the kernel's own affair. So with Ŷ = x̂ Ŵᵀ in float64 from the same x,

    error of one output = |Y − Ŷ| / (|x̂| |Ŵ|ᵀ)                            the backward error of the product

is what float32 sums leave: at most a few 2⁻²⁴ whatever the model, the size of activations or their outliers. A kernel
that is wrong by a relative f in one row of one matrix shows there as f · max |Ŷ| / (|x̂| |Ŵ|ᵀ), about f / 10 and more.

Some kernels sum larger numbers than these and take the rest off at the end, so that it cancels: what float32 leaves
then is of the size of what was summed, and grows with the number of sums (`left_by_sums`). The error is measured
against that where it is the larger.

Where the same rounding is written differently for different processors, each way has a name here, and a product is
right when it does what one of its ways says, in all of its outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qalora_export.grid.narrow import BFLOAT16

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
INT8_BOTTOM, INT8_TOP = np.float32(-128), np.float32(127)
# Measured over 2, 3, 4 and 8 bits, groups of 32, 64 and 128, both runtimes, one token and many: at most 4e-7, and 9e-7
# with activations whose outliers are 64 times the rest. A product that is wrong by 1 in 1,000 shows 1e-5 and more.
BACKWARD = 2e-6
# A float32 operation is off by at most 2⁻²⁴ of its result, anywhere between: 2⁻²⁴/√3 in the mean square.
FLOAT32_NOISE = 2**-24 / 3**0.5
# Standard deviations within which sums that cancel are right. Of 1e9 outputs of right kernels two are beyond six;
# measured, at most 2.6 (`tests/arm64/`), where a product × 1.001 is 16 and more off.
DEVIATIONS = 6


@dataclass(frozen=True, slots=True)
class Weight:
    """Ŵ = scaled + mins: float64 (out, in), and (out, in / block) or None.

    mins: what a block adds to all of its weights, where the kernel multiplies it with the block's sum of x̂ apart.
    """

    scaled: Float64
    mins: Float64 | None = None

    def some(self, rows: slice) -> Weight:
        return Weight(self.scaled[rows], None if self.mins is None else self.mins[rows])


@dataclass(frozen=True, slots=True)
class Seen:
    """What a kernel makes of its input. values: x̂, float64 (positions, in). sums: of each block, where stored apart.

    sizes: of the numbers that are summed, where the kernel sums larger ones and takes the rest off afterwards.
    carried: the same, where they have one sign, so that what cancels in the end was carried through all the sums.
    """

    values: Float64
    sums: Float64 | None = None
    sizes: Float64 | None = None
    carried: Float64 | None = None


class Arithmetic(ABC):
    """A documented way to round the input of a product. name: for the reader."""

    name: str

    @abstractmethod
    def seen(self, x: Float32) -> Seen:
        """x (positions, in)."""


@dataclass(frozen=True, slots=True)
class Plain(Arithmetic):
    """x̂ is x in another float type, rounded to nearest even. dtype: float32 (nothing rounds), float16 or bfloat16."""

    name: str
    dtype: np.dtype[Any]

    def seen(self, x: Float32) -> Seen:
        with np.errstate(over="ignore"):
            return Seen(x.astype(self.dtype).astype(np.float64))


@dataclass(frozen=True, slots=True)
class Int8Blocks(Arithmetic):
    """x̂ = d·q, with d = max |x| / 127 of each block of in-features and q = round(x · r), all in float32.

    block: in-features. step: the type in which d is stored. factor: r is 127 / max |x| or 1 / d. half: where halves go.
    stores_sums: the kernel multiplies the mins of the weights by float16(d · Σ q), with d not yet rounded.
    shift: the kernel multiplies q + shift, which no q makes negative, and takes the shift off at the end.
    """

    name: str
    block: int
    step: np.dtype[Any]
    factor: Literal["127/max", "1/d"]
    half: Literal["even", "away"] = "even"
    stores_sums: bool = False
    shift: int = 0

    def seen(self, x: Float32) -> Seen:
        blocks = x.reshape(len(x), -1, self.block)
        largest = np.abs(blocks).max(axis=-1)  # (positions, in / block)
        d = largest / INT8_TOP
        top, bottom = (INT8_TOP, largest) if self.factor == "127/max" else (np.float32(1), d)
        factor = np.divide(top, bottom, out=np.zeros_like(d), where=bottom > 0)
        q = _rounded(blocks * factor[..., None], self.half)
        with np.errstate(over="ignore"):
            step = d.astype(self.step).astype(np.float64)
            sums = (d * q.sum(axis=-1)).astype(np.float16).astype(np.float64) if self.stores_sums else None
        values = (q.astype(np.float64) * step[..., None]).reshape(x.shape)
        carried = ((q + self.shift).astype(np.float64) * step[..., None]).reshape(x.shape) if self.shift else None
        return Seen(values, sums, carried=carried)


@dataclass(frozen=True, slots=True)
class SignedInt8Blocks(Arithmetic):
    """ggml's Q8_K: the value of largest size in a block of 256 becomes −127, d = 1 / (−127 / that value) in float32."""

    name: str
    block: int = 256

    def seen(self, x: Float32) -> Seen:
        blocks = x.reshape(len(x), -1, self.block)
        at = np.abs(blocks).argmax(axis=-1)[..., None]
        extreme = np.take_along_axis(blocks, at, axis=-1)  # (positions, in / 256, 1), with its sign
        factor = np.divide(-INT8_TOP, extreme, out=np.zeros_like(extreme), where=extreme != 0)
        d = np.divide(np.float32(1), factor, out=np.zeros_like(factor), where=factor != 0)
        q = np.minimum(_rounded(blocks * factor, "even"), INT8_TOP)
        return Seen((q.astype(np.float64) * d.astype(np.float64)).reshape(x.shape))


@dataclass(frozen=True, slots=True)
class Int8Rows(Arithmetic):
    """x̂ = (q − z) / f: a whole row of x in 256 levels from its least value, or 0, to its largest, or 0.

    f = 255 / (largest − least) and the integer z, the level of 0, in float32, halves to even. The sums of the blocks
    are those of x as it is, not of x̂: the kernel takes them off by themselves, in float32. It sums q and takes z off
    the sum, so what float32 leaves is of the size of both, also for an x of zeros. Source: KleidiAI,
    kai_lhs_quant_pack_qai8dxp_f32.c.
    """

    name: str
    block: int

    def seen(self, x: Float32) -> Seen:
        least, largest = np.minimum(np.float32(0), x.min(axis=1)), np.maximum(np.float32(0), x.max(axis=1))
        span = largest - least
        factor = np.divide(np.float32(255), span, out=np.ones_like(span), where=span > 0)
        below, above = INT8_BOTTOM - least * factor, INT8_TOP - largest * factor  # the level of 0 by either end
        nearer = np.where(below + above < 0, below, above)
        zero = np.rint(np.clip(nearer, INT8_BOTTOM, INT8_TOP))[:, None]
        q = np.clip(_rounded(x * factor[:, None], "even") + zero, INT8_BOTTOM, INT8_TOP)
        step = (np.float32(1) / factor).astype(np.float64)[:, None]
        sums = x.reshape(len(x), -1, self.block).astype(np.float64).sum(axis=-1)
        return Seen((q - zero).astype(np.float64) * step, sums, (np.abs(q) + np.abs(zero)).astype(np.float64) * step)


def cut_to_bfloat16(values: Float32) -> Float32:
    """The upper 16 bits of each float32: towards 0, as who takes them by a shift."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _rounded(values: Float32, half: str) -> Float32:
    """To the nearest integer, as float32; halves as round-to-even instructions or as C's roundf send them."""
    if half == "even":
        return np.rint(values)
    whole = np.trunc(values)  # exact, and so is the difference
    return whole + np.where(np.abs(values - whole) >= np.float32(0.5), np.sign(values), np.float32(0))


def product(seen: Seen, weight: Weight) -> tuple[Float64, Float64]:
    """(Ŷ, |x̂| |Ŵ|ᵀ), each float64 (positions, out); the second is only a size, and computed in float32.

    Where sums cancel it is at least so large that what float32 leaves of them lies within BACKWARD of it.
    """
    y = product_of(seen.values, weight, seen.sums)
    size = _size(seen.values if seen.sizes is None else seen.sizes, weight.scaled)
    if weight.mins is not None:
        size += _size(_sums_of(seen.values, weight) if seen.sums is None else seen.sums, weight.mins)
    if seen.carried is not None and weight.mins is not None:
        carried = _size(seen.carried, weight.scaled) + _size(_sums_of(seen.carried, weight), weight.mins)
        size = np.maximum(size, left_by_sums(carried, weight.mins.shape[1]) / BACKWARD)
    return y, size


def left_by_sums(carried: Float64, blocks: int) -> Float64:
    """How far float32 may leave sums of `blocks` numbers each from the exact ones; carried: what the sums come to.

    A running sum of numbers of one sign grows evenly, so the squares of what its additions leave come to blocks / 3 of
    the last one's. Making each number rounds it too, and the sums are put together: two more.
    """
    return carried * float(DEVIATIONS * FLOAT32_NOISE * np.sqrt(blocks / 3 + 2))


def product_of(x: Float64, weight: Weight, sums: Float64 | None = None) -> Float64:
    """x Ŵᵀ, float64 (positions, out). sums: of the blocks of x, where they are not those of x itself."""
    y = x @ weight.scaled.T
    if weight.mins is not None:
        y += (_sums_of(x, weight) if sums is None else sums) @ weight.mins.T
    return y


def _sums_of(x: Float64, weight: Weight) -> Float64:
    """Sums of x over each block of `weight`, (positions, in / block)."""
    assert weight.mins is not None
    return np.asarray(x.reshape(len(x), weight.mins.shape[1], -1).sum(axis=-1))


def _size(a: Float64, b: Float64) -> Float64:
    with np.errstate(over="ignore"):
        sizes = np.abs(a).astype(np.float32) @ np.abs(b).astype(np.float32).T
    return sizes.astype(np.float64)


FLOAT32 = Plain("float32", np.dtype(np.float32))
FLOAT16 = Plain("float16", np.dtype(np.float16))
BF16 = Plain("bfloat16", BFLOAT16)
