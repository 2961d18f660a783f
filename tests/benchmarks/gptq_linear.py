"""A stand-in for GPTQModel's torch layer, for the benchmark of PEFT's use_qalora where GPTQModel is not installed.

GPTQ storage (qweight int32 (in·bits/32, out), integer zeros int32 (in/g, out·bits/32), scales float16 (in/g, out)) and
GPTQModel's torch arithmetic: the whole matrix is dequantized by torch in every forward, and autograd keeps it for
backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qalora_export.qalora.layer import QALoraLinear


class GptqLinear(nn.Module):
    """Random codes and zeros in the shape of `layer`, its scales transposed. 2, 4 or 8 bits."""

    def __init__(self, layer: QALoraLinear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, layer.bits
        per_word = 32 // layer.bits
        device, groups = layer.codes.device, layer.in_features // layer.group_size
        self.register_buffer("qweight", _words(layer.in_features // per_word, layer.out_features, device))
        self.register_buffer("qzeros", _words(groups, layer.out_features // per_word, device))
        self.register_buffer("scales", layer.scale.T.contiguous())
        self.register_buffer("g_idx", torch.arange(layer.in_features, device=device) // layer.group_size)
        self.register_buffer("wf", torch.arange(0, 32, layer.bits, device=device, dtype=torch.int32))

    def dequantize(self) -> Tensor:
        """(in, out) float16: scale[g] · (code - zero[g]), gathered by g_idx."""
        top = 2**self.bits - 1
        zeros = (self.qzeros.unsqueeze(2) >> self.wf).bitwise_and(top).view(self.scales.shape)
        codes = (self.qweight.unsqueeze(1) >> self.wf.unsqueeze(-1)).bitwise_and(top).view(-1, self.out_features)
        return self.scales[self.g_idx] * (codes - zeros[self.g_idx])

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.dequantize().to(x.dtype))


def _words(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32, device=device)
