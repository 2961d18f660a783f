"""Random layers and the slow, obvious formulas they are judged by."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qalora_export.grid import GroupAffine, pack_codes
from qalora_export.qalora.layer import QALoraLinear


def random_matrix(out: int, columns: int, *, bits: int = 4, group: int = 32, seed: int = 0) -> GroupAffine:
    rng = np.random.default_rng(seed)
    shape = (out, columns // group)
    scale = rng.uniform(0.005, 0.05, shape).astype(np.float16)
    offset = rng.uniform(-0.5, 0.1, shape).astype(np.float16)
    return GroupAffine(rng.integers(0, 2**bits, (out, columns)).astype(np.uint8), scale, offset, bits)


def layer_of(matrix: GroupAffine, *, bias: bool = False) -> QALoraLinear:
    out, columns = matrix.shape
    layer = QALoraLinear(columns, out, bits=matrix.bits, group_size=matrix.group_size, bias=bias)
    layer.codes.copy_(torch.from_numpy(pack_codes(matrix.codes, matrix.bits)))
    layer.scale.copy_(torch.from_numpy(matrix.scale))
    layer.offset.copy_(torch.from_numpy(matrix.offset))
    if layer.bias is not None:
        torch.nn.init.uniform_(layer.bias, generator=torch.Generator().manual_seed(1))
    return layer


def trained_layer(
    out: int = 48,
    columns: int = 96,
    *,
    bits: int = 4,
    group: int = 32,
    rank: int = 4,
    pool: int | None = None,
    seed: int = 0,
    bias: bool = False,
) -> QALoraLinear:
    """A layer whose adapter moves the offsets visibly."""
    layer = layer_of(random_matrix(out, columns, bits=bits, group=group, seed=seed), bias=bias)
    generator = torch.Generator().manual_seed(seed)
    layer.attach_adapter(rank, 2.0 * rank, pool=pool, generator=generator)
    layer.lora_B.data.normal_(0, 0.05, generator=generator)
    return layer


def naive_weight(layer: QALoraLinear, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """The float64 matrix of the layer, one element at a time by DESIGN.md, "Canonical form" and "QA-LoRA".

    With a and b it is differentiable in them: roundings are passed straight through.
    """
    from qalora_export.grid import unpack_codes

    codes = torch.from_numpy(unpack_codes(layer.codes.numpy(), layer.bits)).double()  # (out, in)
    group = layer.group_size
    offset = layer.offset.double()
    if a is not None and b is not None:
        exact = offset + layer.scaling * (b @ a).repeat_interleave(layer.pool // group, dim=1)
        offset = exact + (exact.to(torch.float16).double() - exact).detach()
    columns = []
    for i in range(layer.in_features):
        exact = layer.scale[:, i // group].double() * codes[:, i] + offset[:, i // group]
        columns.append(exact + (exact.float().double() - exact).detach())  # one rounding, to float32
    return torch.stack(columns, dim=1)
