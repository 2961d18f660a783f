"""offset_eff = fp16(m + α/r · B A) in one pass: reads 2 bytes and writes 2 per group, where torch moves about 60.

In float64, as qalora.function.effective_offset explains: the products of float32 numbers are exact there, the sum over
the rank runs in order, and float16 cannot see in which order another library adds. Rounded through float32, like
torch's own float64 → float16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, POOLS = 32, 32


@triton.jit
def _effective_offset(
    offset,
    a,
    b,
    result,
    rows,
    pools,
    RANK: tl.constexpr,
    REPEAT: tl.constexpr,
    SCALING: tl.constexpr,
    ROWS: tl.constexpr,
    POOLS: tl.constexpr,
):
    """ROWS × POOLS pools. offset and result (rows, pools·REPEAT), a (RANK, pools), b (rows, RANK)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pool = tl.program_id(1) * POOLS + tl.arange(0, POOLS)
    total = tl.zeros((ROWS, POOLS), tl.float64)
    for k in range(RANK):
        left = tl.load(b + row * RANK + k, mask=row < rows, other=0).to(tl.float64)
        right = tl.load(a + k * pools + pool, mask=pool < pools, other=0).to(tl.float64)
        total = tl.fma(left[:, None], right[None, :], total)
    delta = total * tl.full((1, 1), SCALING, tl.float64)  # a bare float would be a float32
    keep = (row < rows)[:, None] & (pool < pools)[None, :]
    for repeat in tl.static_range(REPEAT):
        group = row[:, None].to(tl.int64) * (pools * REPEAT) + pool[None, :] * REPEAT + repeat
        moved = tl.load(offset + group, mask=keep, other=0).to(tl.float64) + delta
        tl.store(result + group, moved.to(tl.float32).to(tl.float16), mask=keep)


def effective_offset(offset: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """float16 (out, in/g); arguments as in qalora.function.effective_offset."""
    rows, pools = offset.shape[0], a.shape[1]
    result = torch.empty_like(offset, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(pools, POOLS))
    _effective_offset[grid](
        offset.contiguous(),
        a.contiguous(),
        b.contiguous(),
        result,
        rows,
        pools,
        RANK=a.shape[0],
        REPEAT=offset.shape[1] // pools,
        SCALING=float(scaling),
        ROWS=ROWS,
        POOLS=POOLS,
        enable_fp_fusion=False,  # torch rounds α/r · (B A) before it adds m
    )
    return result
