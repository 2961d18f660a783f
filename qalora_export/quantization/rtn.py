"""Round to nearest, no data: min/max grid per group, or the grid of least squared error ("mse"), which on a grid of
super-blocks both are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_export.grid import GroupAffine, SuperBlockGrid
from qalora_export.quantization.grid_fit import Grid, checked_weight, fit_min_max, fit_weighted, to_group_affine
from qalora_export.quantization.rules import Plan
from qalora_export.quantization.super_fit import fit_super_block

FITTED_VALUES = 2**22  # weights whose grids are searched at a time, in float64


def round_to_nearest(weight: Tensor, plan: Plan, *, where: str, mse: bool = False) -> GroupAffine:
    """Weight (out, in) of any float dtype -> canonical form. Raises InputError naming `where` for bad weights."""
    size = plan.group_size
    groups = checked_weight(weight, size, where=where).unflatten(1, (-1, size))  # (out, in/g, g)
    grid = _fitted(groups, plan, mse=mse)
    return to_group_affine(grid.codes(groups, plan.bits).flatten(1), grid, plan.bits, where=where, kind=plan.grid)


def _fitted(groups: Tensor, plan: Plan, *, mse: bool) -> Grid:
    if isinstance(plan.grid, SuperBlockGrid):
        return fit_super_block(groups, torch.ones_like(groups[0]), plan.grid)
    if not mse:
        return fit_min_max(groups, plan.bits, sym=plan.sym)
    alike = torch.ones_like(groups[0, 0])
    parts = groups.split(max(1, FITTED_VALUES // groups[0].numel()))
    fitted = [fit_weighted(rows, alike, plan.bits, sym=plan.sym) for rows in parts]
    return Grid(*(torch.cat(numbers) for numbers in zip(*fitted, strict=True)))
