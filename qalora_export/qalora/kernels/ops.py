"""The kernels as functions: launched directly in eager mode, as torch custom ops `qalora::…` inside torch.compile.

A custom op is opaque to the compiler, with a shape it can reason about; but each call passes through torch's dispatcher
(about 20 µs on the CPU where it was measured), and a layer makes three in a step.

None has a gradient formula: they are called where no graph is recorded (inside the layer's autograd function, or
without grad), and anything else is refused.
"""
# ruff: noqa: ARG001 (the shape functions have the signatures of their ops)

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _launcher(name: str) -> Callable[..., Tensor]:
    """The function `name` of kernels/`name`.py, imported when first used: Triton need not be installed."""
    launch: Callable[..., Tensor] = getattr(importlib.import_module(f"{__package__}.{name}"), name)
    return launch


def _run(op: Callable[..., Tensor], name: str, *arguments: Any) -> Tensor:
    if torch.compiler.is_compiling():
        return op(*arguments)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        raise RuntimeError(f"kernel {name} has no gradient: call it inside an autograd function or without grad")
    return _launcher(name)(*arguments)


@torch.library.custom_op("qalora::dequantize", mutates_args=())
def dequantize_op(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    dtype: torch.dtype,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
) -> Tensor:
    return _launcher("dequantize")(packed, scale, offset, bits, dtype, a, b, scaling)


@dequantize_op.register_fake
def _(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    dtype: torch.dtype,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
) -> Tensor:
    return packed.new_empty((packed.shape[0], packed.shape[1] * 8 // bits), dtype=dtype)


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
    """Packed codes, with an adapter if given, → (out, in) in `dtype`; see kernels/dequantize.py."""
    return _run(dequantize_op, "dequantize", packed, scale, offset, bits, dtype, a, b, scaling)


@torch.library.custom_op("qalora::effective_offset", mutates_args=())
def effective_offset_op(offset: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return _launcher("effective_offset")(offset, a, b, scaling)


@effective_offset_op.register_fake
def _(offset: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return offset.new_empty(offset.shape)


def effective_offset(offset: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """fp16(m + scaling · B A), (out, in/g); see kernels/effective_offset.py."""
    return _run(effective_offset_op, "effective_offset", offset, a, b, scaling)


@torch.library.custom_op("qalora::group_sum", mutates_args=())
def group_sum_op(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    return _launcher("group_sum")(x, groups, dtype)


@group_sum_op.register_fake
def _(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], groups), dtype=dtype)


def group_sum(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(..., in) → (..., groups) in `dtype`; see kernels/group_sum.py."""
    return _run(group_sum_op, "group_sum", x, groups, dtype)


@torch.library.custom_op("qalora::fused_linear", mutates_args=())
def fused_linear_op(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    return _launcher("fused_linear")(x, packed, scale, offset, bits)


@fused_linear_op.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def fused_linear(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """x · dequant(…)ᵀ, (..., out) in the dtype of x; see kernels/fused_linear.py."""
    return _run(fused_linear_op, "fused_linear", x, packed, scale, offset, bits)
