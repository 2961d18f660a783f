"""QA-LoRA+: scales beside offsets, both low-rank, both trained through the grid.

    scale_eff  = fp16( s + α/r · B_s A_s / σ )        offset_eff = fp16( m + α/r · B_m A_m − c · (scale_eff − s) )
    y          = x · (codes · scale_eff + offset_eff)ᵀ                                                    (out, in/g)

c and σ: mean and standard deviation of the codes of a group. So the scale turns about the middle of the group and
leaves its mean where it was, and the same step of either update moves weights as far: one learning rate serves both.
Rounding passes gradients straight through. As in QA-LoRA the merged model is the trained one: merging writes the two
float16 matrices, codes stay. This layer is plain autograd: it makes the whole matrix at every step, which small models
can afford.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.manifest import parent_of
from qalora_export.grid import GroupAffine

SEEDS_APART = 10_007  # every module of every seed draws numbers of its own


class _Float16(torch.autograd.Function):
    """Round to float16, gradients straight through."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        return x.to(torch.float16).to(x.dtype)

    @staticmethod
    def backward(_: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _rounded(x: Tensor) -> Tensor:
    rounded: Tensor = _Float16.apply(x)  # type: ignore[no-untyped-call]
    return rounded


class _LowRank(nn.Module):
    """scaling · B A, (rows, columns): A (rank, columns) Kaiming uniform, B (rows, rank) zero."""

    def __init__(self, rows: int, columns: int, rank: int, scaling: float, generator: torch.Generator) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(rank, columns)), nn.Parameter(torch.zeros(rows, rank))
        self.scaling = scaling
        nn.init.kaiming_uniform_(self.a, a=5**0.5, generator=generator)

    def forward(self) -> Tensor:
        return self.scaling * (self.b @ self.a)


class ScaleOffsetLinear(nn.Module):
    """A quantized layer whose scales and offsets are trained; rank: of each of the two updates."""

    codes: Tensor
    scale: Tensor
    offset: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, matrix: GroupAffine, bias: Tensor | None, *, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.bits = matrix.bits
        for name in ("codes", "scale", "offset"):
            self.register_buffer(name, torch.from_numpy(np.array(getattr(matrix, name), np.float32)))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        rows, groups = matrix.scale.shape
        codes = self.codes.unflatten(1, (groups, -1))
        self.register_buffer("centre", codes.mean(-1))
        self.register_buffer("spread", codes.std(-1, correction=0).clamp_min(1.0))  # a group of equal codes has none
        generator = torch.Generator().manual_seed(seed)
        self.scale_update, self.offset_update = (
            _LowRank(rows, groups, rank, alpha / rank, generator) for _ in range(2)
        )

    def effective(self) -> tuple[Tensor, Tensor]:
        """scale_eff and offset_eff, float32 holding float16 values, (out, in/g)."""
        scale = _rounded(self.scale + self.scale_update() / self.spread)
        return scale, _rounded(self.offset + self.offset_update() - self.centre * (scale - self.scale))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        scale, offset = self.effective()
        codes = self.codes.unflatten(1, (scale.shape[1], -1))
        weight = (codes * scale[..., None] + offset[..., None]).flatten(1)  # one rounding: codes · scale is exact
        return F.linear(x, weight, self.bias)

    @torch.no_grad()
    def merged(self) -> GroupAffine:
        """The canonical matrix of the trained layer."""
        scale, offset = (part.numpy().astype(np.float16) for part in self.effective())
        return GroupAffine(self.codes.numpy().astype(np.uint8), scale, offset, self.bits)


def attach_scales(model: nn.Module, base: Path, modules: Iterable[str], *, rank: int, alpha: float, seed: int) -> None:
    """Freeze `model`, loaded from the canonical checkpoint `base`, and put trainable layers in place of the named."""
    checkpoint = CanonicalCheckpoint(base)
    model.requires_grad_(False)
    for index, name in enumerate(modules):
        bias, matrix = model.get_submodule(name).bias, checkpoint.group_affine(name)
        parent, _, leaf = name.rpartition(".")
        kept = bias.detach() if isinstance(bias, Tensor) else None
        layer = ScaleOffsetLinear(matrix, kept, rank=rank, alpha=alpha, seed=seed * SEEDS_APART + index)
        setattr(model.get_submodule(parent), leaf, layer)


def write_merged(model: nn.Module, base: Path, out: Path) -> None:
    """The canonical checkpoint `out`: `base` with the trained scales and offsets of `model`."""

    def trained(name: str) -> GroupAffine | None:
        layer = model.get_submodule(name)
        return layer.merged() if isinstance(layer, ScaleOffsetLinear) else None

    write_changed(base, out, "scales and offsets, trained through the grid", trained)


def write_changed(base: Path, out: Path, method: str, changed: Callable[[str], GroupAffine | None]) -> None:
    """The canonical checkpoint `out`: `base` with the matrices that `changed` gives for a module, None: as it is."""
    checkpoint = CanonicalCheckpoint(base)
    parents = [parent_of(base, "base")]
    with CanonicalWriter(
        out, checkpoint.config, checkpoint.companions(), kind="base", parents=parents, settings={"method": method}
    ) as writer:
        for name in checkpoint.modules:
            writer.add_quantized(name, changed(name) or checkpoint.group_affine(name))
        writer.add_rest_of(checkpoint)
