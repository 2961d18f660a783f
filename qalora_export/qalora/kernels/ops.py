"""The kernels as torch custom ops `qalora::…`: opaque to torch.compile, with shapes it can reason about.

None has a gradient formula: they are called where no graph is recorded (inside the layer's autograd function, or
without grad), and torch refuses anything else.
"""
# ruff: noqa: ARG001 (the shape functions have the signatures of their ops)

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("qalora::dequantize", mutates_args=())
def dequantize(packed: Tensor, scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Packed codes → (out, in) in `dtype`; see kernels/dequantize.py."""
    from qalora_export.qalora.kernels.dequantize import dequantize as launch

    return launch(packed, scale, offset, bits, dtype)


@dequantize.register_fake
def _(packed: Tensor, scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((packed.shape[0], packed.shape[1] * 8 // bits), dtype=dtype)


@torch.library.custom_op("qalora::effective_offset", mutates_args=())
def effective_offset(offset: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """fp16(m + scaling · B A), (out, in/g); see kernels/offset.py."""
    from qalora_export.qalora.kernels.offset import effective_offset as launch

    return launch(offset, a, b, scaling)


@effective_offset.register_fake
def _(offset: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return offset.new_empty(offset.shape)


@torch.library.custom_op("qalora::group_sum", mutates_args=())
def group_sum(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(..., in) → (..., groups) in `dtype`; see kernels/group_sum.py."""
    from qalora_export.qalora.kernels.group_sum import group_sum as launch

    return launch(x, groups, dtype)


@group_sum.register_fake
def _(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], groups), dtype=dtype)


@torch.library.custom_op("qalora::fused_linear", mutates_args=())
def fused_linear(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """x · dequant(…)ᵀ, (..., out) in the dtype of x; see kernels/fused_linear.py."""
    from qalora_export.qalora.kernels.fused_linear import fused_linear as launch

    return launch(x, packed, scale, offset, bits)


@fused_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))
