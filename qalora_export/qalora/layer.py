"""The QA-LoRA layer (DESIGN.md, "QA-LoRA"; arXiv 2309.14717, Algorithm 1).

    offset_eff = fp16( m + α/r · B A )                     (out, in/g), straight-through rounding in training
    y          = x · dequant(codes, scale, offset_eff)ᵀ

Training goes *through* offset_eff: there is no adapter branch, so the merged layer is the trained layer and merging
is writing offset_eff. On a grid of super-blocks it is rounded to that grid instead (qalora/super_blocks.py). Backward,
with d_offset constant over the groups that one pool covers:

    dx = gy · W        d_offset = gyᵀ · poolsum(x)        dB = α/r · d_offset · Aᵀ        dA = α/r · Bᵀ · d_offset

On a GPU with Triton the parts that are not matrix products run in the kernels of qalora/kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qalora_export.errors import InputError
from qalora_export.grid import AFFINE16, SuperBlockGrid, SymmetricGrid, grid_named
from qalora_export.grid.named import SUPER_BLOCK
from qalora_export.grid.packing import packed_width
from qalora_export.qalora.dequant import dequantize
from qalora_export.qalora.kernels import dispatch, ops
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
    delta = scaling * (b.double() @ a.double())  # (out, in/pool)
    repeat = offset.shape[1] // a.shape[1]
    if repeat > 1:
        delta = delta.repeat_interleave(repeat, dim=1)  # (out, in/g)
    return (offset.double() + delta).to(torch.float32).to(torch.float16)


class _QALoraFunction(torch.autograd.Function):
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
        return _product(x, a, b, scaling, bits, grid, *held)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, pooled, *held = ctx.saved_tensors
        gy = grads[0]
        dx = da = db = None
        if pooled is not None:  # first: its temporaries are gone before the dequantized matrix takes their place
            da, db = _adapter_gradients(gy.flatten(0, -2), pooled.flatten(0, -2), a, b, ctx.scaling)
        if ctx.needs_input_grad[0]:
            dx = gy @ _weight(gy.dtype, a, b, ctx.scaling, ctx.bits, ctx.grid, *held)
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


def _product(
    x: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, bits: int, grid: str, *held: Tensor
) -> Tensor:
    """x · Wᵀ, (..., out) in the dtype of x. held: codes, scale, offset and, on a grid of super-blocks, their steps."""
    if x.numel() <= dispatch.fused_rows * x.shape[-1] and dispatch.applies(x) and x.dtype != torch.float64:
        scale, offset = _scale_and_offset(a, b, scaling, grid, *held[1:])
        return ops.fused_linear(x, held[0], scale, offset, bits)
    return F.linear(x, _weight(x.dtype, a, b, scaling, bits, grid, *held))


def _weight(
    dtype: torch.dtype, a: Tensor | None, b: Tensor | None, scaling: float, bits: int, grid: str, *held: Tensor
) -> Tensor:
    """The matrix the layer multiplies by, (out, in) in `dtype`."""
    codes, *numbers = held
    if a is not None and b is not None and grid == AFFINE16.name and dispatch.applies(codes):
        scale, offset = numbers
        return ops.dequantize(codes, scale, offset, bits, dtype, a, b, scaling)  # offset_eff never leaves the kernel
    return dequantize(codes, *_scale_and_offset(a, b, scaling, grid, *numbers), bits, dtype)


def _scale_and_offset(
    a: Tensor | None, b: Tensor | None, scaling: float, grid: str, *numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """What codes are multiplied with and what is added, adapter and all, both (out, in/g): float16, or on a grid of
    super-blocks float32.
    """
    if grid == AFFINE16.name:
        scale, offset = numbers
        return scale, offset if a is None or b is None else effective_offset(offset, a, b, scaling)
    named = super_block_grid(grid)
    if a is not None and b is not None:
        scale, offset, scale_step, offset_step = numbers
        offset, offset_step = effective_levels(offset, offset_step, a, b, scaling, named)
        numbers = (scale, offset, scale_step, offset_step)
    return scale_and_offset(numbers, named)


def _frozen(rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=device), requires_grad=False)


class QALoraLinear(nn.Module):
    """A linear layer in canonical form, optionally with a QA-LoRA adapter.

    Frozen: codes uint8 (out, in·bits/8), scale float16 (out, in/g), offset float16 (out, in/g); bias (out,) or None. On
    a grid of super-blocks scale and offset are levels, uint8, beside scale_step and offset_step float16 (out, in/256);
    on a symmetric one there is no offset, so no adapter either, and scale is int8.
    They are parameters that never require gradients, not buffers, because FSDP divides parameters among devices.
    Trainable, float32: lora_A (r, in/pool), lora_B (out, r), where pool is g or a multiple of it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        grid: str = AFFINE16.name,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        named = grid_named(grid, bits, group_size, where="a layer")
        if not named.divides(in_features, group_size):
            raise InputError(f"{in_features} in-features do not divide into groups of {group_size} on grid {grid}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.grid = bits, group_size, grid
        groups, on_levels = in_features // group_size, isinstance(named, SuperBlockGrid)
        self.symmetric = isinstance(named, SymmetricGrid)
        number = (torch.int8 if self.symmetric else torch.uint8) if on_levels else torch.float16
        self.codes = _frozen(out_features, packed_width(in_features, bits), torch.uint8, device)
        self.scale = _frozen(out_features, groups, number, device)
        if not self.symmetric:
            self.offset = _frozen(out_features, groups, number, device)
        if on_levels:
            blocks = in_features // SUPER_BLOCK
            self.scale_step = _frozen(out_features, blocks, torch.float16, device)
            if not self.symmetric:
                self.offset_step = _frozen(out_features, blocks, torch.float16, device)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.scaling = 0.0

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """codes, scale and offset, and on a grid of super-blocks the steps of scale and of offset; where the offset
        follows from the scale, codes, scale and its step.
        """
        if self.symmetric:
            return self.codes, self.scale, self.scale_step
        numbers = (self.codes, self.scale, self.offset)
        return numbers if self.grid == AFFINE16.name else (*numbers, self.scale_step, self.offset_step)

    @property
    def pool(self) -> int:
        """In-features that one column of lora_A covers; the group size when there is no adapter."""
        return self.group_size if self.lora_A is None else self.in_features // self.lora_A.shape[1]

    def attach_adapter(
        self, rank: int, alpha: float, *, pool: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Add a trainable adapter: A Kaiming uniform (a=√5, as in PEFT), B zero, so offset_eff starts at m exactly.

        pool: the module's own group size, or a multiple of it; where a multiple does not divide the in-features, its
        greatest divisor that does, so that one setting serves matrices of different widths. Raises InputError when
        pool is no multiple of the group size, and where there is no offset that it could move.
        """
        if self.symmetric:
            raise InputError(
                f"an adapter cannot move the offsets of grid {self.grid}",
                why="they are −2^(bits−1)·scale",
                fix="leave this module out of train.targets, or quantize it on another grid",
            )
        pool = pool or self.group_size
        if pool % self.group_size:
            raise InputError(
                f"pool length {pool} does not fit group size {self.group_size} and {self.in_features} in-features",
                why="an adapter merges without loss only if its pool is a multiple of the quantization group",
                fix="set pool to the group size or a multiple",
            )
        a = torch.empty(rank, self.in_features // math.gcd(pool, self.in_features), dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
        self.set_adapter(a, torch.zeros(self.out_features, rank, dtype=torch.float32), alpha / rank)

    def set_adapter(self, a: Tensor, b: Tensor, scaling: float) -> None:
        """Install given adapter tensors, a (r, in/pool) and b (out, r), as trainable parameters on our device."""
        self.lora_A = nn.Parameter(a.to(self.codes.device))
        self.lora_B = nn.Parameter(b.to(self.codes.device))
        self.scaling = scaling

    def detach_adapter(self) -> None:
        self.lora_A = self.lora_B = None
        self.scaling = 0.0

    @torch.no_grad()
    def effective_offset(self) -> Tensor:
        """offset_eff, float32 (out, in/g), holding float16 values or products of a level. Merge writes exactly this."""
        return _scale_and_offset(self.lora_A, self.lora_B, self.scaling, self.grid, *self.packed[1:])[1].float()

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix the layer multiplies by, adapter and all, (out, in) in `dtype`."""
        return _weight(dtype, self.lora_A, self.lora_B, self.scaling, self.bits, self.grid, *self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x, or in autocast's dtype when autocast is on (float64 stays)."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        run = _QALoraFunction.apply if torch.is_grad_enabled() else _product
        y = run(x, self.lora_A, self.lora_B, self.scaling, self.bits, self.grid, *self.packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QALoraLinear:
        """Devices move, numbers do not: `.half()` or `.bfloat16()` must not round scale, offset or the adapter."""
        fixed = {id(tensor) for tensor in self.packed}
        adapter = [p for p in (self.lora_A, self.lora_B) if p is not None]
        wide = {id(t) for p in adapter for t in (p, p.grad) if t is not None}

        def guarded(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = id(tensor) in fixed or (id(tensor) in wide and moved.dtype.itemsize < tensor.dtype.itemsize)
            return tensor.to(moved.device) if kept and moved.dtype != tensor.dtype else moved

        super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        rank = 0 if self.lora_A is None else self.lora_A.shape[0]
        return (
            f"in={self.in_features}, out={self.out_features}, bits={self.bits}, group_size={self.group_size}, "
            f"grid={self.grid}, rank={rank}"
        )
