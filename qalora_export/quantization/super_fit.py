"""Fitting a grid of super-blocks: scales and offsets of all groups of a super-block together.

The steps are shared, so a group gets the nearest scale that its super-block has, and then the offset that is best
beside that scale, again the nearest one. Least squares for the codes so found gives the next real scales and offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_export.grid import NamedGrid, SuperBlockGrid, SymmetricGrid
from qalora_export.grid.projection import projected
from qalora_export.quantization.grid_fit import Grid, fit_weighted, least_squares

ROUNDS = 4


def snapped(grid: Grid, kind: NamedGrid) -> Grid:
    """Real scales and offsets (out, in/g) as the grid has them: float16 each, or levels of their super-block."""
    if isinstance(kind, SymmetricGrid):
        return _about_middle(projected(grid.scale, kind), kind)
    if isinstance(kind, SuperBlockGrid):
        return Grid(projected(grid.scale, kind), -projected(-grid.offset, kind))
    scale, offset = (part.to(torch.float16).to(torch.float64) for part in grid)
    return Grid(scale, offset)


def fit_super_block(groups: Tensor, importance: Tensor, kind: SuperBlockGrid) -> Grid:
    """The grid (out, n) with little Σ importance·(w − ŵ)² for groups (out, n, g), importance (n, g), float64; n groups
    are one super-block or several.
    """
    bits, count, sym = kind.bits, groups.shape[1], isinstance(kind, SymmetricGrid)
    real = _stacked([fit_weighted(groups[:, j], importance[j], bits, sym=sym) for j in range(count)])
    if not sym:
        real = _from_zero(real, groups.amax(-1) / (2**bits - 1))
    best, error = snapped(real, kind), groups.new_full((len(groups), count // kind.groups), torch.inf)
    for _ in range(ROUNDS):
        candidate = snapped(real, kind) if sym else _beside(real, groups, importance, kind)
        codes = candidate.codes(groups, bits)
        now = ((candidate.values(codes) - groups).square() * importance).sum(-1).unflatten(1, (-1, kind.groups)).sum(-1)
        wins = (now < error).repeat_interleave(kind.groups, dim=1)
        best = Grid(
            torch.where(wins, candidate.scale, best.scale),
            torch.where(wins, candidate.offset, best.offset),
        )
        error = torch.minimum(now, error)
        real = _stacked([least_squares(codes[:, j], groups[:, j], importance[j], bits, sym=sym) for j in range(count)])
        if sym:
            continue
        power = (codes.square() * importance).sum(-1)
        real = _from_zero(real, (codes * groups * importance).sum(-1) / torch.where(power == 0, 1, power))
    return best


def _from_zero(real: Grid, scale: Tensor) -> Grid:
    """Offsets cannot be above 0: groups that want that begin at 0 with another scale."""
    above = real.offset > 0
    return Grid(torch.where(above, scale, real.scale), torch.where(above, 0, real.offset))


def _about_middle(scale: Tensor, kind: SymmetricGrid) -> Grid:
    return Grid(scale, -(2.0 ** (kind.bits - 1)) * scale)


def _beside(real: Grid, groups: Tensor, importance: Tensor, kind: SuperBlockGrid) -> Grid:
    """Scales as the grid has them, and the offsets that are best beside those, for the codes that real offsets give."""
    scale = projected(real.scale, kind)
    codes = Grid(scale, real.offset).codes(groups, kind.bits)
    share = importance / importance.sum(-1, keepdim=True)
    offset = ((groups - scale[..., None] * codes) * share).sum(-1)
    return Grid(scale, -projected(-offset, kind))


def _stacked(grids: list[Grid]) -> Grid:
    return Grid(torch.stack([g.scale for g in grids], 1), torch.stack([g.offset for g in grids], 1))
