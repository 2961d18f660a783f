"""Scales and offsets of a layer on a grid of super-blocks, and the offsets that training moves (DESIGN.md, "Grids").

    offset_eff = −step · level,  both next to  m + α/r · B A        straight-through in training

The step of a super-block moves with its largest offset, so no level is ever cut off and every level keeps its share:
step = float16(step of the base · largest now / largest of the base). Without an update that is the base, bit for bit.
Scales move in the same way where they are trained (qalora/scales.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_export.grid import GRIDS, SuperBlockGrid
from qalora_export.grid.projection import half
from qalora_export.qalora.low_rank import update


def super_block_grid(name: str) -> SuperBlockGrid:
    """The grid of that name, known to be one of super-blocks."""
    grid = GRIDS[name]
    assert isinstance(grid, SuperBlockGrid)
    return grid


def products(levels: Tensor, step: Tensor) -> Tensor:
    """step · level, float32 (out, in/g), exact; levels uint8 or int8 (out, in/g), step float16 (out, in/256)."""
    blocks = levels.unflatten(-1, (step.shape[-1], -1)).to(torch.float32)
    wide: Tensor = blocks * step.to(torch.float32).unsqueeze(-1)
    return wide.flatten(-2)


def scale_and_offset(numbers: tuple[Tensor, ...], grid: SuperBlockGrid) -> tuple[Tensor, Tensor]:
    """What codes are multiplied with and what is added, float32 (out, in/g). numbers: scale, offset and their steps, on
    a symmetric grid scale and its step.
    """
    if grid.symmetric:
        scale = products(*numbers)
        return scale, -(2.0 ** (grid.bits - 1)) * scale
    level, offset, scale_step, offset_step = numbers
    return products(level, scale_step), -products(offset, offset_step)


def effective_levels(
    levels: Tensor, step: Tensor, a: Tensor, b: Tensor, scaling: float, grid: SuperBlockGrid
) -> tuple[Tensor, Tensor]:
    """(levels uint8 (out, in/g), step float16 (out, in/256)) of base offsets −step · level moved by scaling · B A."""
    return moved_levels(levels, step, -update(a, b, scaling, levels.shape[1]), grid)


def moved_levels(levels: Tensor, step: Tensor, change: Tensor, grid: SuperBlockGrid) -> tuple[Tensor, Tensor]:
    """(levels uint8 (out, in/g), step float16 (out, in/256)) next to step · level + change, float64 (out, in/g).

    In float64, as function.effective_offset: exact products, sums whose order moves nothing that the grid can see. The
    step is infinite where float16 cannot hold it.
    """
    before = levels.unflatten(1, (-1, grid.groups)).double() * step.double().unsqueeze(-1)  # (out, in/256, groups)
    wanted = before + change.unflatten(1, (-1, grid.groups))
    largest, largest_before = wanted.amax(-1).clamp_min(0), before.amax(-1)
    free = largest_before <= 0  # a super-block of zeros has no step to go by
    share = largest / torch.where(free, 1, largest_before)
    moved = half(torch.where(free, largest / grid.top, step.double() * share))
    wide = moved.unsqueeze(-1)
    nearest = (wanted / torch.where(wide > 0, wide, torch.inf)).round().clamp(0, grid.top)
    return nearest.flatten(1).to(torch.uint8), moved.to(torch.float16)
