"""Dequantization in torch, bit for bit equal to grid.GroupAffine.dequantize.

w[o, i] = s[o, i // g] · q[o, i] + m[o, i // g]        in float32, then at most one rounding to the compute dtype

On a GPU with Triton `dequantize` is one kernel (qalora/kernels) with the same bits; dequantize_torch is its oracle.
"""

import torch
from torch import Tensor

from qalora_export.qalora.kernels import dispatch, ops


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """(out, in·bits/8) uint8 -> (out, in) uint8; byte layout in grid.packing."""
    if bits == 8:
        return packed
    out = packed.shape[0]
    if bits == 3:
        triple = packed.view(out, -1, 3).to(torch.int32)
        word = triple[..., 0] | (triple[..., 1] << 8) | (triple[..., 2] << 16)  # (out, in/8)
        shifts = torch.arange(0, 24, 3, device=packed.device, dtype=torch.int32)
        return ((word[..., None] >> shifts) & 7).to(torch.uint8).view(out, -1)
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).view(out, -1)


def dequantize(packed: Tensor, scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """(out, in) matrix in `dtype`.

    packed uint8 (out, in·bits/8); scale float16 (out, in/g); offset float16 or float32 holding float16 values
    (out, in/g). s·q is exact in float32; the sum is the one rounding; a narrower `dtype` adds one more, and float64
    holds the same float32 numbers.
    """
    if dispatch.applies(packed):
        return ops.dequantize(packed, scale, offset, bits, dtype)
    return dequantize_torch(packed, scale, offset, bits, dtype)


def dequantize_torch(packed: Tensor, scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The same in plain torch, on any device."""
    q = unpack_codes(packed, bits).view(*scale.shape, -1).to(torch.float32)  # (out, in/g, g)
    weight = torch.addcmul(offset.to(torch.float32).unsqueeze(-1), q, scale.to(torch.float32).unsqueeze(-1))
    return weight.view(scale.shape[0], -1).to(dtype)
