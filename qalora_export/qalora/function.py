"""What a QA-LoRA layer computes, forward and backward (DESIGN.md, "QA-LoRA"; arXiv 2309.14717, Algorithm 1).

    offset_eff = fp16( m + α/r · B A )                     (out, in/g), straight-through rounding in training
    y          = x · dequant(codes, scale, offset_eff)ᵀ

Training goes *through* offset_eff: there is no adapter branch, so the merged layer is the trained layer and merging
is writing offset_eff. On a grid of super-blocks it is rounded to that grid instead (qalora/super_blocks.py); scales are
trained beside offsets in qalora/scales.py. Backward, with d_offset constant over the groups that one pool covers:

    dx = gy · W        d_offset = gyᵀ · poolsum(x)        dB = α/r · d_offset · Aᵀ        dA = α/r · Bᵀ · d_offset

On a GPU with Triton the parts that are not matrix products run in the kernels of qalora/kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qalora_export.grid import AFFINE16
from qalora_export.qalora.dequant import dequantize
from qalora_export.qalora.kernels import dispatch, ops
from qalora_export.qalora.low_rank import update
from qalora_export.qalora.super_blocks import effective_levels, scale_and_offset, super_block_grid


def group_sum(x: Tensor, groups: int, dtype: torch.dtype | None = None) -> Tensor:
    """Sum over each of `groups` equal runs of in-features: (..., in) -> (..., groups). The paper's AvgPool × L.

    Accumulates in float32, or in float64 when x is float64; answers in that, or rounded once to `dtype`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if dispatch.applies(x) and wide == torch.float32:
        return ops.group_sum(x, groups, dtype or wide)
    sums: Tensor = x.unflatten(-1, (groups, -1)).sum(-1, dtype=wide).to(dtype or wide)
    return sums


def effective_offset(offset: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """fp16(m + scaling · B A): offset float16 (out, in/g), a (r, in/pool), b (out, r) -> float16 (out, in/g).

    B A runs in float64, where the products of float32 numbers are exact and the order of summation moves nothing that
    float16 can see. So every device, BLAS, thread count and TF32 setting rounds to the same offset, and an adapter
    trained on a GPU merges on a CPU to the numbers it was trained with. Autocast leaves float64 alone. torch rounds
    float64 to float16 through float32, on every device; written out here because compilers may shorten it.
    """
    if dispatch.applies(offset):
        return ops.effective_offset(offset, a, b, scaling)
    return (offset.double() + update(a, b, scaling, offset.shape[1])).to(torch.float32).to(torch.float16)


class QALoraFunction(torch.autograd.Function):
    """y = x Wᵀ. Saved for backward: what the module holds anyway, and poolsum(x), 1/pool of x; never W, never x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
        bits: int,
        grid: str,
        *held: Tensor,
    ) -> Tensor:
        ctx.scaling, ctx.bits, ctx.grid = scaling, bits, grid
        pooled = None
        if a is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            pooled = group_sum(x, a.shape[1], x.dtype)  # (..., in/pool)
        ctx.save_for_backward(a, b, pooled, *held)
        return product(x, a, b, scaling, bits, grid, *held)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, pooled, *held = ctx.saved_tensors
        gy = grads[0]
        dx = da = db = None
        if pooled is not None:  # first: its temporaries are gone before the dequantized matrix takes their place
            da, db = _adapter_gradients(gy.flatten(0, -2), pooled.flatten(0, -2), a, b, ctx.scaling)
        if ctx.needs_input_grad[0]:
            dx = gy @ weight_of(gy.dtype, a, b, ctx.scaling, ctx.bits, ctx.grid, *held)
        return dx, da, db, None, None, None, *(None for _ in held)


def _adapter_gradients(gy: Tensor, pooled: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dA (r, in/pool) and dB (out, r) from gy (T, out) and pooled (T, in/pool), in the cheaper order of products.

    By way of d_offset = gyᵀ · pooled where the pools are few, and past it, by (gy · B)ᵀ · pooled and
    gyᵀ · (pooled · Aᵀ), where they are many beside the rank, as in any large model: at 4096 in-features, g = 32 and
    r = 16 that is a quarter of the work, and no (out, in/pool) temporary.
    """
    (rows, out), pools, rank = gy.shape, pooled.shape[1], a.shape[0]
    if rows * out * pools + 2 * out * pools * rank <= 2 * rows * rank * (out + pools):
        # d_offset transposed, (in/pool, out): CPU libraries are three times as fast with the few rows first
        d_offset = scaling * (pooled.T @ gy).double()
        return (d_offset @ b.double()).T.to(a.dtype), (a.double() @ d_offset).T.to(b.dtype)
    da = (gy @ b.to(gy.dtype)).T @ pooled
    db = gy.T @ (pooled @ a.to(gy.dtype).T)
    return scaling * da.to(a.dtype), scaling * db.to(b.dtype)


def product(
    x: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, bits: int, grid: str, *held: Tensor
) -> Tensor:
    """x · Wᵀ, (..., out) in the dtype of x. held: codes, scale, offset and, on a grid of super-blocks, their steps."""
    if x.numel() <= dispatch.fused_rows * x.shape[-1] and dispatch.applies(x) and x.dtype != torch.float64:
        scale, offset = scale_and_offset_of(a, b, scaling, grid, *held[1:])
        return ops.fused_linear(x, held[0], scale, offset, bits)
    return F.linear(x, weight_of(x.dtype, a, b, scaling, bits, grid, *held))


def weight_of(
    dtype: torch.dtype, a: Tensor | None, b: Tensor | None, scaling: float, bits: int, grid: str, *held: Tensor
) -> Tensor:
    """The matrix the layer multiplies by, (out, in) in `dtype`."""
    codes, *numbers = held
    if a is not None and b is not None and grid == AFFINE16.name and dispatch.applies(codes):
        scale, offset = numbers
        return ops.dequantize(codes, scale, offset, bits, dtype, a, b, scaling)  # offset_eff never leaves the kernel
    return dequantize(codes, *scale_and_offset_of(a, b, scaling, grid, *numbers), bits, dtype)


def scale_and_offset_of(
    a: Tensor | None, b: Tensor | None, scaling: float, grid: str, *numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """What codes are multiplied with and what is added, adapter and all, both (out, in/g): float16, or on a grid of
    super-blocks float32.
    """
    if a is not None and b is not None:
        numbers = with_offsets_moved(a, b, scaling, grid, *numbers)
    if grid == AFFINE16.name:
        scale, offset = numbers
        return scale, offset
    return scale_and_offset(numbers, super_block_grid(grid))


def with_offsets_moved(a: Tensor, b: Tensor, scaling: float, grid: str, *numbers: Tensor) -> tuple[Tensor, ...]:
    """The numbers beside the codes with offset_eff in place of the offset, in the shapes and dtypes they had."""
    scale, offset, *steps = numbers
    if grid == AFFINE16.name:
        return scale, effective_offset(offset, a, b, scaling)
    offset, step = effective_levels(offset, steps[1], a, b, scaling, super_block_grid(grid))
    return scale, offset, steps[0], step
