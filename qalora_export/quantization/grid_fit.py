"""Choosing scale and offset of a group: rounded to fp16 first, codes chosen afterwards against the rounded numbers.

    asymmetric   s = fp16((max − min) / (2^b − 1))                        m = fp16(min)
    symmetric    s = fp16(max(−min / 2^(b−1), max / (2^(b−1) − 1)))       m = −2^(b−1) · s, exact in fp16

A constant group gets s = 0 and m = fp16(value); a zero group gets zeros. fp16 here is a choice of grid, not a narrowing
of data: what it costs is part of the reported weight error.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qalora_export.errors import InputError
from qalora_export.grid import (
    AFFINE16,
    GroupAffine,
    Levels,
    NamedGrid,
    SuperBlockGrid,
    SymmetricGrid,
    SymmetricLevels,
    factor,
)

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
REFINEMENTS = 3
# Adding this and taking it away rounds a float64 to an integer, ties to even, exactly as torch.round does; but
# torch.round on a block of our size wakes its thread pool, a thousand times slower when the cores are busy.
ROUND = 1.5 * 2.0**52


class Grid(NamedTuple):
    """scale and offset, float64 tensors (...) that hold fp16 numbers; infinite where fp16 overflows."""

    scale: Tensor
    offset: Tensor

    def codes(self, values: Tensor, bits: int) -> Tensor:
        """Nearest codes of values (..., n), ties to even; 0 where the scale is 0."""
        scale = torch.where(self.scale == 0, torch.inf, self.scale)
        return ((values - self.offset[..., None]) / scale[..., None]).clamp_(0, 2**bits - 1).add_(ROUND).sub_(ROUND)

    def values(self, codes: Tensor) -> Tensor:
        """s·q + m in float64 (..., n)."""
        return self.scale[..., None] * codes + self.offset[..., None]


def min_max_grid(low: Tensor, high: Tensor, bits: int, *, sym: bool) -> Grid:
    """The grid that spans [low, high]; low, high float64 (...)."""
    if sym:
        middle = 2 ** (bits - 1)
        return _symmetric(torch.maximum(-low / middle, high / (middle - 1)), bits)
    return Grid(_fp16((high - low) / (2**bits - 1)), _fp16(low))


def fit_min_max(groups: Tensor, bits: int, *, sym: bool) -> Grid:
    """Plain min/max over the last axis of groups (..., g), float64."""
    return min_max_grid(groups.amin(-1), groups.amax(-1), bits, sym=sym)


def fit_weighted(groups: Tensor, importance: Tensor, bits: int, *, sym: bool) -> Grid:
    """The grid with the least Σ importance·(w − ŵ)², searched per group; never worse than fit_min_max.

    groups float64 (..., g), importance float64 (g,). Candidates are ranges shrunk about their middle (clipping a few
    outliers buys a finer grid for the rest), then weighted least squares of s and m given the codes, repeated.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    middle, half = (low + high) / 2, (high - low) / 2
    best = min_max_grid(low, high, bits, sym=sym)
    error = _error(best, groups, importance, bits)
    for ratio in SHRINK[1:]:
        candidate = (
            min_max_grid(low * ratio, high * ratio, bits, sym=True)
            if sym
            else min_max_grid(middle - half * ratio, middle + half * ratio, bits, sym=False)
        )
        best, error = _better(best, error, candidate, groups, importance, bits)
    for _ in range(REFINEMENTS):
        candidate = least_squares(best.codes(groups, bits), groups, importance, bits, sym=sym)
        best, error = _better(best, error, candidate, groups, importance, bits)
    return best


def to_group_affine(codes: Tensor, grid: Grid, bits: int, *, where: str, kind: NamedGrid = AFFINE16) -> GroupAffine:
    """codes (out, in), grid (out, in/g) -> the canonical form. Raises InputError when fp16 cannot hold the grid.

    kind: the grid on which scale and offset lie.
    """
    if not (grid.scale.isfinite().all() and grid.offset.isfinite().all()):
        raise InputError(
            "the weights are too large for fp16 scale and offset",
            where=where,
            why="fp16 ends at 65504",
            fix="skip this module with a rule",
        )
    numbers = codes.to(torch.uint8).cpu().numpy()
    if isinstance(kind, SuperBlockGrid):
        scale, scale_step = factor(grid.scale.cpu().numpy(), kind, where=where)
        if isinstance(kind, SymmetricGrid):
            return GroupAffine.on_levels(numbers, SymmetricLevels(kind, scale.view(np.int8), scale_step))
        offset, offset_step = factor(-grid.offset.cpu().numpy(), kind, where=where)
        return GroupAffine.on_levels(numbers, Levels(kind, scale, offset, scale_step, offset_step))
    return GroupAffine(
        numbers,
        (grid.scale + 0.0).to(torch.float16).cpu().numpy(),  # + 0.0 turns -0 into 0
        (grid.offset + 0.0).to(torch.float16).cpu().numpy(),
        bits,
    )


def checked_weight(weight: Tensor, group_size: int, *, where: str) -> Tensor:
    """The weight (out, in) in float64. Raises InputError for NaN or infinity and when g does not divide in."""
    if weight.shape[1] % group_size:
        raise InputError(f"{weight.shape[1]} in-features do not divide into groups of {group_size}", where=where)
    if not weight.isfinite().all():
        raise InputError("a weight is NaN or infinite", where=where, fix="repair or retrain the model")
    return weight.to(torch.float64)


def _symmetric(scale: Tensor, bits: int) -> Grid:
    scale = _fp16(scale)
    return Grid(scale, _fp16(-(2.0 ** (bits - 1)) * scale))


def _fp16(values: Tensor) -> Tensor:
    return values.to(torch.float16).to(torch.float64)


def _error(grid: Grid, groups: Tensor, importance: Tensor, bits: int) -> Tensor:
    error = grid.values(grid.codes(groups, bits)).sub_(groups).square_() @ importance
    return torch.where(error.isfinite(), error, torch.inf)


def _better(
    best: Grid, error: Tensor, candidate: Grid, groups: Tensor, importance: Tensor, bits: int
) -> tuple[Grid, Tensor]:
    new = _error(candidate, groups, importance, bits)
    wins = new < error
    grid = Grid(torch.where(wins, candidate.scale, best.scale), torch.where(wins, candidate.offset, best.offset))
    return grid, torch.where(wins, new, error)


def least_squares(codes: Tensor, groups: Tensor, importance: Tensor, bits: int, *, sym: bool) -> Grid:
    """s and m that minimize Σ h (s·q + m − w)² for given codes; where all codes agree, s = 0."""
    weight = importance / importance.sum()
    if sym:
        centred = codes - 2 ** (bits - 1)
        power = centred.square() @ weight
        scale = ((centred * groups) @ weight) / torch.where(power == 0, 1, power)
        return _symmetric(scale.clamp_min(0), bits)
    mean_q, mean_w = codes @ weight, groups @ weight
    variance = (codes - mean_q[..., None]).square() @ weight
    covariance = ((codes - mean_q[..., None]) * (groups - mean_w[..., None])) @ weight
    scale = _fp16(covariance / torch.where(variance == 0, 1, variance)).clamp_min(0)
    return Grid(scale, _fp16(mean_w - scale * mean_q))
