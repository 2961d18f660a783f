"""y = x · dequant(codes, scale, offset)ᵀ for few rows of x, without ever writing the matrix.

A product with few rows waits for memory: dequantize + cuBLAS moves 0.6 + 2 + 2 bytes of a 4-bit weight, this kernel
0.6. The tile is rounded to the dtype of x exactly as the matrix would be, so both multiply the same numbers and only
the order of the float32 sum differs. Off unless asked for: see `fused_rows` in dispatch.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qalora_export.qalora.kernels.tiles import INTERPRETED, RUN, as_words, load_codes, round_to

# tl.dot wants at least 16 rows; 64 columns of the result and 128 in-features fill a program of 4 warps.
ROWS, OUT, DEPTH = 16, 64, 128


@triton.jit
def _fused_linear(
    x,
    words,
    scale,
    offset,
    y,
    rows,
    out,
    runs,
    BITS: tl.constexpr,
    RUNS_PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    RUNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One ROWS × OUT tile of y. x (rows, 8·runs), y (rows, out); a step over in-features takes RUNS runs of eight."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * OUT + tl.arange(0, OUT)).to(tl.int64)
    total = tl.zeros((ROWS, OUT), tl.float32)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        keep = (column < out)[:, None] & (run < runs)[None, :]  # [OUT, RUNS]
        q = load_codes(words, column[:, None] * runs + run[None, :], keep, BITS).to(tl.float32)
        group = column[:, None] * (runs // RUNS_PER_GROUP) + (run // RUNS_PER_GROUP)[None, :]
        s = tl.load(scale + group, mask=keep, other=0).to(tl.float32)
        m = tl.load(offset + group, mask=keep, other=0).to(tl.float32)
        w = round_to(s[:, :, None] * q + m[:, :, None], x.dtype.element_ty, INTERPRETED)  # [OUT, RUNS, 8]
        feature = first * 8 + tl.arange(0, RUNS * 8)
        wanted = (row < rows)[:, None] & (feature < runs * 8)[None, :]
        part = tl.load(x + row[:, None].to(tl.int64) * (runs * 8) + feature[None, :], mask=wanted, other=0)
        w = tl.trans(tl.reshape(w, (OUT, RUNS * 8)))
        if INTERPRETED:  # its tl.dot takes bf16 for integers; float32 holds the same numbers and products
            part, w = part.to(tl.float32), w.to(tl.float32)
        total = tl.dot(part, w, total, input_precision="ieee")
    keep = (row < rows)[:, None] & (column < out)[None, :]
    value = round_to(total, y.dtype.element_ty, INTERPRETED)
    tl.store(y + row[:, None].to(tl.int64) * out + column[None, :], value, mask=keep)


def fused_linear(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """x (..., in) float32, bf16 or fp16 → (..., out) in the same dtype."""
    out, per_row = scale.shape
    columns = x.shape[-1]
    rows = x.numel() // columns
    y = torch.empty(*x.shape[:-1], out, dtype=x.dtype, device=x.device)
    if rows:
        _fused_linear[(triton.cdiv(rows, ROWS), triton.cdiv(out, OUT))](
            x.contiguous(),
            as_words(packed, bits),
            scale.contiguous(),
            offset.contiguous(),
            y,
            rows,
            out,
            columns // RUN,
            BITS=bits,
            RUNS_PER_GROUP=columns // per_row // RUN,
            ROWS=ROWS,
            OUT=OUT,
            RUNS=DEPTH // RUN,
            INTERPRETED=INTERPRETED,
        )
    return y
