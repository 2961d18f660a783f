"""Sums of x over groups of in-features, accumulated in float32: reads x once, writes 1/pool of it.

Not fused further: the matrix product that follows reads x inside cuBLAS, where nothing can be hooked in, and the
sum's own pass over x is small beside it: at T rows of n features it moves 2·T·n bytes while the product does 2·T·n·out
operations, 1 to 3 % of its time for out ≥ 4096 on a GPU of 200 operations per byte.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qalora_export.qalora.kernels.tiles import INTERPRETED, round_to

ELEMENTS_PER_PROGRAM = 4096


@triton.jit
def _group_sum(
    x, sums, groups, POOL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr
):
    """BLOCK groups of POOL neighbouring elements; WIDTH is POOL rounded up to a power of two."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    keep = (group < groups)[:, None] & (column < POOL)[None, :]
    values = tl.load(x + group[:, None] * POOL + column[None, :], mask=keep, other=0).to(tl.float32)
    total = tl.sum(values, axis=1)
    tl.store(sums + group, round_to(total, sums.dtype.element_ty, INTERPRETED), mask=group < groups)


def group_sum(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(..., in) float32, bf16 or fp16 → (..., groups) in `dtype`: float32 sums, rounded once."""
    pool = x.shape[-1] // groups
    sums = torch.empty(*x.shape[:-1], groups, dtype=dtype, device=x.device)
    width = triton.next_power_of_2(pool)
    block = max(1, ELEMENTS_PER_PROGRAM // width)
    if sums.numel():
        _group_sum[(triton.cdiv(sums.numel(), block),)](
            x.contiguous(),
            sums,
            sums.numel(),
            POOL=pool,
            WIDTH=width,
            BLOCK=block,
            INTERPRETED=INTERPRETED,
        )
    return sums
