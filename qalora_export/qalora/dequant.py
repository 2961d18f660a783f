"""Dequantization in torch, bit for bit equal to grid.GroupAffine.dequantize.

w[o, i] = s[o, i // g] · q[o, i] + m[o, i // g]        in float32, then at most one rounding to the compute dtype

On a GPU with Triton `dequantize` is one kernel (qalora/kernels) with the same bits; dequantize_torch is its oracle.
"""

import math

import torch
from torch import Tensor

from qalora_export.qalora.kernels import dispatch, ops


def unpack_codes(packed: Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """(out, in·bits/8) uint8 -> (out, in) in `dtype`; byte layout in grid.packing.

    Lane after lane of the fewest codes that fill whole bytes, straight into the result: on a CPU twice to four times as
    fast as widening every byte to all its codes first.
    """
    lanes = math.lcm(8, bits) // bits  # 4, 8, 2, 1 codes
    runs = packed.reshape(packed.shape[0], -1, lanes * bits // 8)  # (out, in/lanes, 1 or 3 bytes)
    codes = torch.empty(*runs.shape[:2], lanes, dtype=dtype, device=packed.device)
    for lane in range(lanes):
        byte, shift = divmod(lane * bits, 8)
        code = runs[..., byte] >> shift
        if shift + bits > 8:  # the code goes on in the next byte
            code = code | (runs[..., byte + 1] << (8 - shift))
        codes[..., lane] = code & (2**bits - 1)
    return codes.view(packed.shape[0], -1)


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
    q = unpack_codes(packed, bits, torch.float32).view(*scale.shape, -1)  # (out, in/g, g)
    q.mul_(scale.to(torch.float32).unsqueeze(-1)).add_(offset.to(torch.float32).unsqueeze(-1))
    return q.view(scale.shape[0], -1).to(dtype)
