"""Round to nearest, no data: min/max grid per group, least squares on a grid of super-blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_export.grid import GroupAffine, SuperBlockGrid
from qalora_export.quantization.grid_fit import Grid, checked_weight, fit_min_max, to_group_affine
from qalora_export.quantization.rules import Plan
from qalora_export.quantization.super_fit import fit_super_block


def round_to_nearest(weight: Tensor, plan: Plan, *, where: str) -> GroupAffine:
    """Weight (out, in) of any float dtype -> canonical form. Raises InputError naming `where` for bad weights."""
    size = plan.group_size
    groups = checked_weight(weight, size, where=where).unflatten(1, (-1, size))  # (out, in/g, g)
    grid = _fitted(groups, plan)
    return to_group_affine(grid.codes(groups, plan.bits).flatten(1), grid, plan.bits, where=where, kind=plan.grid)


def _fitted(groups: Tensor, plan: Plan) -> Grid:
    if isinstance(plan.grid, SuperBlockGrid):
        return fit_super_block(groups, torch.ones_like(groups[0]), plan.grid)
    return fit_min_max(groups, plan.bits, sym=plan.sym)
