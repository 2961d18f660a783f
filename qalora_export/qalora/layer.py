"""The QA-LoRA layer (design §3; arXiv 2309.14717, Algorithm 1).

    offset_eff = fp16( m + α/r · B A )                     (out, in/g), straight-through rounding in training
    y          = x · dequant(codes, scale, offset_eff)ᵀ

Training goes *through* offset_eff: there is no adapter branch, so the merged layer is the trained layer and merging
is writing offset_eff. Backward:

    dx = gy · W        d_offset = gyᵀ · groupsum(x)        dB = α/r · d_offset · Aᵀ        dA = α/r · Bᵀ · d_offset
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qalora_export.grid.packing import packed_width
from qalora_export.qalora.dequant import dequantize


def group_sum(x: Tensor, groups: int) -> Tensor:
    """Sum of each group of in-features in float32: (..., in) -> (..., in/g). The paper's AvgPool × L."""
    return x.unflatten(-1, (groups, -1)).sum(-1, dtype=torch.float32)


class _EffectiveOffset(torch.autograd.Function):
    """offset_eff = float32(fp16(m + scaling · B A)), gradient straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, offset: Tensor, a: Tensor, b: Tensor, scaling: float, repeat: int) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.scaling, ctx.repeat = scaling, repeat
        with torch.autocast(offset.device.type, enabled=False):
            delta = scaling * (b.float() @ a.float())  # (out, in/pool)
            if repeat > 1:
                delta = delta.repeat_interleave(repeat, dim=1)  # (out, in/g)
            return (offset.float() + delta).to(torch.float16).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            grad = ctx.scaling * grads[0].float()
            if ctx.repeat > 1:
                grad = grad.unflatten(1, (-1, ctx.repeat)).sum(-1)
            return None, (b.float().T @ grad).to(a.dtype), (grad @ a.float().T).to(b.dtype), None, None


class _QuantizedLinear(torch.autograd.Function):
    """y = x Wᵀ with W rebuilt from packed codes in forward and again in backward; W is never saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, packed, scale, offset)
        ctx.bits = bits
        return F.linear(x, dequantize(packed, scale, offset, bits, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, packed, scale, offset = ctx.saved_tensors
        gy = grads[0]
        dx = d_offset = None
        if ctx.needs_input_grad[0]:
            dx = gy @ dequantize(packed, scale, offset, ctx.bits, gy.dtype)
        if ctx.needs_input_grad[3]:
            pooled = group_sum(x, scale.shape[1]).to(gy.dtype)  # (..., in/g)
            d_offset = gy.flatten(0, -2).T @ pooled.flatten(0, -2)  # (out, in/g)
            d_offset = d_offset.to(offset.dtype)
        return dx, None, None, d_offset, None


class QALoraLinear(nn.Module):
    """A linear layer in canonical form, optionally with a QA-LoRA adapter.

    Buffers: codes uint8 (out, in·bits/8), scale float16 (out, in/g), offset float16 (out, in/g); bias (out,) or None.
    Adapter parameters, float32: lora_A (r, in/pool), lora_B (out, r), where pool is g or a multiple of it.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, in_features: int, out_features: int, *, bits: int, group_size: int, bias: bool = False,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        groups = in_features // group_size
        width = packed_width(in_features, bits)
        self.register_buffer("codes", torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.zeros(out_features, groups, dtype=torch.float16, device=device))
        self.register_buffer("offset", torch.zeros(out_features, groups, dtype=torch.float16, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.scaling = 0.0

    def attach_adapter(self, rank: int, alpha: float, *, pool: int | None = None,
                       generator: torch.Generator | None = None) -> None:  # fmt: skip
        """Add a trainable adapter: A Kaiming uniform (a=√5, as in PEFT), B zero, so offset_eff starts at m exactly."""
        pool = pool or self.group_size
        if pool % self.group_size or self.in_features % pool:
            raise ValueError(f"pool length {pool} is not a multiple of group size {self.group_size}")
        a = torch.empty(rank, self.in_features // pool, dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
        self.lora_A = nn.Parameter(a.to(self.codes.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=self.codes.device))
        self.scaling = alpha / rank

    def detach_adapter(self) -> None:
        self.lora_A = self.lora_B = None
        self.scaling = 0.0

    def effective_offset(self) -> Tensor:
        """offset_eff, float32 holding float16 values, (out, in/g). Merge writes exactly this."""
        if self.lora_A is None or self.lora_B is None:
            return self.offset.float()
        repeat = self.scale.shape[1] // self.lora_A.shape[1]
        return _EffectiveOffset.apply(self.offset, self.lora_A, self.lora_B, self.scaling, repeat)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x, or in autocast's dtype when autocast is on."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y = _QuantizedLinear.apply(x, self.codes, self.scale, self.effective_offset(), self.bits)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> QALoraLinear:
        """Devices move, dtypes do not: `.half()` or `.bfloat16()` on a model must not round scale and offset."""
        before = {name: getattr(self, name) for name in ("codes", "scale", "offset")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            moved = getattr(self, name)
            if moved.dtype != old.dtype:
                self._buffers[name] = old.to(moved.device)
        return self

    def extra_repr(self) -> str:
        rank = 0 if self.lora_A is None else self.lora_A.shape[0]
        return (f"in={self.in_features}, out={self.out_features}, bits={self.bits}, group_size={self.group_size}, "
                f"rank={rank}")  # fmt: skip
