"""Packed codes, scale, offset and adapter → the matrix in float32, bf16 or fp16, in one pass at the speed of memory.

    m_eff      = fp16( m + α/r · B A )                     with an adapter; the bits of kernels/effective_offset.py
    w[o, i]    = s[o, i // g] · q[o, i] + m_eff[o, i // g] in float32: s·q is exact, so FMA or not gives the same bits

Rows fill whole bytes and in-features divide into groups, so the matrix is one long line of groups: group n holds
codes n·g … n·g + g - 1, and only the adapter asks for its row. Per 4-bit weight the kernel reads 0.5 + 4/g bytes and
writes 2 (bf16). B A is made here to save a launch and a pass over the offsets; its operands are small enough to stay
in cache: neighbouring groups share a row of B and lie side by side in A.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qalora_export.qalora.kernels.tiles import INTERPRETED, RUN, as_words, load_codes, round_to

ELEMENTS_PER_PROGRAM = 4096


@triton.jit
def _dequantize(
    words,
    scale,
    offset,
    a,
    b,
    matrix,
    groups,
    per_row,
    BITS: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    REPEAT: tl.constexpr,
    SCALING: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """BLOCK groups of RUNS runs each, of `groups` in the matrix and `per_row` in a row.

    a (RANK, per_row / REPEAT) and b (rows, RANK); without an adapter RANK is 0 and both are None.
    """
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]; 2³¹ groups are no matrix, 2³¹ weights may be
    group, keep = number.to(tl.int64), number < groups
    m = tl.load(offset + group, mask=keep, other=0)
    if RANK > 0:
        row = number // per_row  # in 32 bits: dividing 64 takes many instructions
        pool, pools = (number - row * per_row) // REPEAT, per_row // REPEAT
        total = tl.zeros((BLOCK,), tl.float64)
        for k in range(RANK):
            left = tl.load(b + row * RANK + k, mask=keep, other=0).to(tl.float64)
            right = tl.load(a + k * pools + pool, mask=keep, other=0).to(tl.float64)
            total = tl.fma(left, right, total)
        delta = total * tl.full((1,), SCALING, tl.float64)  # a bare float would be a float32
        m = (m.to(tl.float64) + delta).to(tl.float32).to(tl.float16)
    run = group[:, None] * RUNS + tl.arange(0, RUNS)[None, :]  # [BLOCK, RUNS]
    keep_run = keep[:, None] & (run >= 0)
    q = load_codes(words, run, keep_run, BITS).to(tl.float32)  # [BLOCK, RUNS, 8]
    s = tl.load(scale + group, mask=keep, other=0).to(tl.float32)[:, None, None]
    element = run[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    value = round_to(s * q + m.to(tl.float32)[:, None, None], matrix.dtype.element_ty, INTERPRETED)
    tl.store(matrix + element, value, mask=keep_run[:, :, None])


def dequantize(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    dtype: torch.dtype,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 0.0,
) -> Tensor:
    """(out, in) in `dtype`; arguments as in dequant.dequantize and function.effective_offset, same bits."""
    out, per_row = scale.shape
    group_size = packed.shape[1] * 8 // bits // per_row
    matrix = torch.empty(out, per_row * group_size, dtype=dtype, device=packed.device)
    block, rank, repeat = ELEMENTS_PER_PROGRAM // group_size, 0, 1
    if a is not None and b is not None:
        a, b, rank, repeat = a.contiguous(), b.contiguous(), a.shape[0], per_row // a.shape[1]
    _dequantize[(triton.cdiv(scale.numel(), block),)](
        as_words(packed, bits),
        scale.contiguous(),
        offset.contiguous(),
        a,
        b,
        matrix,
        scale.numel(),
        per_row,
        BITS=bits,
        RUNS=group_size // RUN,
        BLOCK=block,
        RANK=rank,
        REPEAT=repeat,
        SCALING=float(scaling),
        INTERPRETED=INTERPRETED,
        enable_fp_fusion=False,  # torch rounds α/r · (B A) before it adds m
    )
    return matrix
