"""QA-LoRA+: the scales of a layer trained beside its offsets (DESIGN.md, "QA-LoRA"), `train --scales`.

    scale_eff  = fp16( s + α/r · B_s A_s / σ )                                      (out, in/g), straight-through
    offset_eff = fp16( m + α/r · B A − c · (scale_eff − s) )
    y          = x · dequant(codes, scale_eff, offset_eff)ᵀ

c and σ are mean and standard deviation of the codes of a group: a scale turns about the middle of its group and leaves
the mean of the weights where it was, and the same step of either update moves weights as far, so one learning rate
serves both. As in QA-LoRA the merged layer is the trained one: merging writes scale_eff and offset_eff, codes stay.
On a grid of super-blocks both go to its levels instead of to float16 (qalora/super_blocks.py), the scale first.
Backward, with G = gyᵀ · x, (out, in):

    d_offset = groupsum(G)        d_scale = (groupsum(G · codes) − c · d_offset) / σ        both summed over each pool
    dB_s = α/r · d_scale · A_sᵀ   dA_s = α/r · B_sᵀ · d_scale                               and so dB, dA of d_offset

G is one more product of the size of the forward's, which the offsets alone do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qalora_export.grid import AFFINE16
from qalora_export.grid.projection import half
from qalora_export.qalora.dequant import dequantize, unpack_codes
from qalora_export.qalora.function import scale_and_offset_of
from qalora_export.qalora.low_rank import update
from qalora_export.qalora.super_blocks import moved_levels, products, super_block_grid

Pair = tuple[Tensor, Tensor]  # A (r, in/pool), B (out, r)
Numbers = Sequence[Tensor]  # scale and offset of a layer, and on a grid of super-blocks their steps


def centre_and_spread(packed: Tensor, bits: int, groups: int) -> Pair:
    """c and σ, float32 (out, groups), of packed codes uint8 (out, in·bits/8); σ is 1 at least.

    Of sums of whole numbers, exact in float64, by one division each, a root and one rounding: the same bits everywhere.
    """
    codes = unpack_codes(packed, bits, torch.float32).unflatten(1, (groups, -1))
    count, total, squares = codes.shape[-1], *(part.sum(-1, dtype=torch.float64) for part in (codes, codes * codes))
    variance = (count * squares - total * total) / count**2
    return (total / count).float(), variance.sqrt().clamp_min(1.0).float()


def effective(
    numbers: Numbers, pair: Pair, scale_pair: Pair, scaling: float, middle: Pair, grid: str
) -> tuple[Tensor, ...]:
    """The numbers of a layer with its adapters, in the shapes and dtypes they had: scale and offset float16 (out, in/g)
    or, on a grid of super-blocks, levels of both and their steps. middle: c and σ.

    In float64 and rounded through float32, as qalora.function.effective_offset and for its reasons.
    """
    scale, offset, *steps = numbers
    (centre, spread), groups = (part.double() for part in middle), scale.shape[1]
    change, turn = update(*pair, scaling, groups), update(*scale_pair, scaling, groups) / spread
    if grid == AFFINE16.name:
        turned = half(scale.double() + turn)
        offset = half(offset.double() + change - centre * (turned - scale.double()))
        return turned.to(torch.float16), offset.to(torch.float16)
    named, before = super_block_grid(grid), products(scale, steps[0]).double()
    scale, scale_step = moved_levels(scale, steps[0], turn, named)
    turned = products(scale, scale_step).double()
    offset, offset_step = moved_levels(offset, steps[1], centre * (turned - before) - change, named)
    return scale, offset, scale_step, offset_step


class ScaleAdapter(nn.Module):
    """What trains the scales of one QALoraLinear: A (r, in/pool) and B (out, r), float32, and c and σ of its codes.

    c and σ are parameters that never require gradients, as the layer's own numbers are, so that FSDP divides them.
    """

    def __init__(self, pair: Pair, packed: Tensor, bits: int, groups: int) -> None:
        super().__init__()
        self.A, self.B = (nn.Parameter(part.to(packed.device)) for part in pair)
        self.centre, self.spread = (
            nn.Parameter(part, requires_grad=False) for part in centre_and_spread(packed.detach(), bits, groups)
        )

    @property
    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.A, self.B

    def effective(self, numbers: Numbers, pair: Pair, scaling: float, grid: str) -> tuple[Tensor, ...]:
        """As the function of this name."""
        return effective(numbers, pair, self.pair, scaling, (self.centre, self.spread), grid)

    def linear(self, x: Tensor, pair: Pair, scaling: float, bits: int, grid: str, *packed: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x, to be differentiated. packed: codes, and the numbers beside."""
        held = (self.centre, self.spread, *packed)
        y: Tensor = _ScaledFunction.apply(x, *pair, *self.pair, scaling, bits, grid, *held)  # type: ignore[no-untyped-call]
        return y


class _ScaledFunction(torch.autograd.Function):
    """Saved for backward: x and what the module holds anyway; never the dequantized matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        scaling: float,
        bits: int,
        grid: str,
        *held: Tensor,
    ) -> Tensor:
        ctx.scaling, ctx.bits, ctx.grid = scaling, bits, grid
        trains = any(ctx.needs_input_grad[1:5])
        ctx.save_for_backward(x if trains else None, a, b, scale_a, scale_b, *held)
        return nn.functional.linear(x, _matrix(x.dtype, (a, b), (scale_a, scale_b), scaling, bits, grid, *held))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, scale_a, scale_b, *held = ctx.saved_tensors
        gy = grads[0]
        adapters: tuple[Tensor | None, ...] = (None, None, None, None)
        if x is not None:  # first: its temporaries are gone before the dequantized matrix takes their place
            moved = _gradients(gy.flatten(0, -2).T @ x.flatten(0, -2), ctx.bits, *held)
            pairs = zip(moved, ((a, b), (scale_a, scale_b)), strict=True)
            adapters = tuple(part for change, pair in pairs for part in _of_pair(change, pair, ctx.scaling))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = gy @ _matrix(gy.dtype, (a, b), (scale_a, scale_b), ctx.scaling, ctx.bits, ctx.grid, *held)
        return dx, *adapters, None, None, None, *(None for _ in held)


def _matrix(
    dtype: torch.dtype, pair: Pair, scale_pair: Pair, scaling: float, bits: int, grid: str, *held: Tensor
) -> Tensor:
    centre, spread, codes, *numbers = held
    moved = effective(numbers, pair, scale_pair, scaling, (centre, spread), grid)
    return dequantize(codes, *scale_and_offset_of(None, None, 0.0, grid, *moved), bits, dtype)


def _gradients(whole: Tensor, bits: int, *held: Tensor) -> Pair:
    """Of offsets and of scales as their updates move them, float32 or wider (out, in/g).

    whole: the gradient of the matrix, (out, in).
    """
    centre, spread, codes, scale, *_ = held
    dtype = torch.promote_types(whole.dtype, torch.float32)
    grouped = whole.to(dtype).unflatten(1, (scale.shape[1], -1))
    d_offset = grouped.sum(-1)
    turned = (grouped * unpack_codes(codes, bits, dtype).view_as(grouped)).sum(-1)
    return d_offset, (turned - centre * d_offset) / spread


def _of_pair(change: Tensor, pair: Pair, scaling: float) -> Pair:
    """dA (r, in/pool) and dB (out, r) of an update whose gradient is `change`, (out, in/g)."""
    a, b = pair
    pooled = scaling * change.unflatten(1, (a.shape[1], -1)).sum(-1).double()
    return (b.double().T @ pooled).to(a.dtype), (pooled @ a.double().T).to(b.dtype)
