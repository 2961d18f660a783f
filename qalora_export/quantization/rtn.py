"""Round to nearest: min/max grid per group, no data."""

from __future__ import annotations

from torch import Tensor

from qalora_export.grid import GroupAffine
from qalora_export.quantization.grid_fit import checked_weight, fit_min_max, to_group_affine
from qalora_export.quantization.rules import Plan


def round_to_nearest(weight: Tensor, plan: Plan, *, where: str) -> GroupAffine:
    """Weight (out, in) of any float dtype -> canonical form. Raises InputError naming `where` for bad weights."""
    size = plan.group_size
    groups = checked_weight(weight, size, where=where).unflatten(1, (-1, size))  # (out, in/g, g)
    grid = fit_min_max(groups, plan.bits, sym=plan.sym)
    return to_group_affine(grid.codes(groups, plan.bits).flatten(1), grid, plan.bits, where=where)
