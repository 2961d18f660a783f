"""Packed codes, scale and offset → the matrix in float32, bf16 or fp16, in one pass at the speed of memory.

    w[o, i] = s[o, i // g] · q[o, i] + m[o, i // g]        in float32: s·q is exact, so FMA or not gives the same bits

Rows fill whole bytes and in-features divide into groups, so the matrix is one long line of groups: group n holds
codes n·g … n·g + g - 1 and the kernel needs no rows. Per 4-bit weight it reads 0.5 + 4/g bytes and writes 2 (bf16).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qalora_export.qalora.kernels.tiles import INTERPRETED, RUN, as_words, load_codes, round_to

ELEMENTS_PER_PROGRAM = 4096


@triton.jit
def _dequantize(words, scale, offset, matrix, groups, BITS: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
                INTERPRETED: tl.constexpr):  # fmt: skip
    """BLOCK groups of RUNS runs each; groups is their number in the whole matrix."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    keep = group < groups
    run = group[:, None] * RUNS + tl.arange(0, RUNS)[None, :]  # [BLOCK, RUNS]
    keep_run = keep[:, None] & (run >= 0)
    q = load_codes(words, run, keep_run, BITS).to(tl.float32)  # [BLOCK, RUNS, 8]
    s = tl.load(scale + group, mask=keep, other=0).to(tl.float32)[:, None, None]
    m = tl.load(offset + group, mask=keep, other=0).to(tl.float32)[:, None, None]
    element = run[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    value = round_to(s * q + m, matrix.dtype.element_ty, INTERPRETED)
    tl.store(matrix + element, value, mask=keep_run[:, :, None])


def dequantize(packed: Tensor, scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """(out, in) in `dtype`; arguments as in qalora.dequant.dequantize, and the same bits."""
    out, per_row = scale.shape
    group_size = packed.shape[1] * 8 // bits // per_row
    matrix = torch.empty(out, per_row * group_size, dtype=dtype, device=packed.device)
    block = ELEMENTS_PER_PROGRAM // group_size
    _dequantize[(triton.cdiv(scale.numel(), block),)](
        as_words(packed, bits), scale.contiguous(), offset.contiguous(), matrix, scale.numel(),
        BITS=bits, RUNS=group_size // RUN, BLOCK=block, INTERPRETED=INTERPRETED,
    )  # fmt: skip
    return matrix
