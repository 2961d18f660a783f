"""ONNX Runtime's product of 8-bit codes on Arm without i8mm, every step the float32 operation of the kernel.

core/mlas/lib: QuantizeARowComputeBlkSum_CompInt8<true>, Q8ComputePackBlkSum and SQ8BitGemmKernel_BlkSum_CompInt8<true>.
tests/arm64 holds it against the kernel itself, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F = np.float32


@dataclass(frozen=True)
class Bytes:
    """codes: uint8 (out, blocks, block). scale: float32 (out, blocks). zero: uint8 (out, blocks)."""

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero: NDArray[np.uint8]

    @classmethod
    def random(cls, out: int, features: int, block: int, seed: int) -> Bytes:
        w = np.random.default_rng(seed).normal(0, 0.02, (out, features // block, block))
        scale = ((w.max(-1) - w.min(-1)) / 255).astype(np.float16).astype(F)
        zero = np.clip(np.rint(-w.min(-1) / scale), 0, 255)
        codes = np.clip(np.rint(w / scale[..., None]) + zero[..., None], 0, 255)
        return cls(codes.astype(np.uint8), scale, zero.astype(np.uint8))


def activations(positions: int, features: int, *, outlier: bool, seed: int) -> NDArray[np.float32]:
    x = np.random.default_rng(seed).normal(0, 1, (positions, features)).astype(F)
    x[:, 17] *= 64 if outlier else 1
    return x


def product(x: NDArray[np.float32], of: Bytes) -> NDArray[np.float32]:
    """x (positions, in) -> (positions, out)."""
    out, blocks, block = of.codes.shape
    parts = x.reshape(len(x), blocks, block)
    largest = np.abs(parts).max(-1)
    step, factor = largest / F(127), np.divide(F(127), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.rint(parts * factor[..., None]).astype(np.int64) + 128  # unsigned bytes
    code = of.codes.astype(np.int64)
    sums = step * q.sum(-1).astype(F)
    mins = -of.scale * of.zero.astype(F)
    shifted = of.scale * (of.zero.astype(F) * F(block) - code.sum(-1).astype(F))
    main, offset, correction = (np.zeros((len(x), out), F) for _ in range(3))
    for k in range(blocks):
        dots = (q[:, k] @ code[:, k].T).astype(F)  # below 2**24, so exact
        main = _fma(step[:, k, None] * of.scale[:, k], dots, main)
        offset = _fma(sums[:, k, None], mins[:, k], offset)
        correction = _fma(step[:, k, None], shifted[:, k], correction)
    return _fma(correction, np.broadcast_to(F(128), main.shape), main + offset)


def _fma(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> NDArray[np.float32]:
    """a·b + c, rounded once: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(F)
