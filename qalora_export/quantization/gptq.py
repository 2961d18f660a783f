"""GPTQ (Frantar et al., arXiv 2210.17323, Algorithm 1) into the canonical form.

For each column i in order, with U the upper Cholesky factor of H⁻¹ (H⁻¹ = Uᵀ U):

    q_i = nearest code of w_i        e = (w_i − ŵ_i) / U_ii        w_j −= e · U_ij   for j > i

Columns go in their natural order, so groups stay in place (g_idx is trivial). Scale and offset of a group are chosen
when the group begins, from the weights as compensated so far, and on a grid of super-blocks when the super-block
begins, for all of its groups. Updates beyond the current block are applied once per
block (the paper's lazy batch updates), which changes nothing but the speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_export.errors import InputError
from qalora_export.grid import GroupAffine, SuperBlockGrid
from qalora_export.grid.named import SUPER_BLOCK
from qalora_export.quantization.grid_fit import Grid, checked_weight, fit_min_max, fit_weighted, to_group_affine
from qalora_export.quantization.refine import refine
from qalora_export.quantization.rules import Plan
from qalora_export.quantization.super_fit import fit_super_block


def gptq(
    weight: Tensor,
    hessian: Tensor,
    plan: Plan,
    *,
    where: str,
    damp: float = 0.01,
    block_size: int = 128,
    search: bool = True,
    sweeps: int = 0,
) -> GroupAffine:
    """Weight (out, in), Hessian (in, in) = 2 X Xᵀ up to a factor -> canonical form; all arithmetic in float64.

    search: look for the grid with the least error weighted by 1/U_ii², the cost that column i's rounding has; without
    it the grid is plain min/max. sweeps: of `refine`, afterwards. Raises InputError naming `where` for weights or a
    Hessian that are not finite.
    """
    bits, size = plan.bits, plan.group_size
    target = checked_weight(weight, size, where=where)
    work, damped = target.clone(), damped_hessian(hessian, damp)
    factor = inverse_cholesky(damped, where=where)
    cost = factor.diagonal().pow(-2)
    codes = torch.empty_like(work)
    scales = work.new_empty(work.shape[0], work.shape[1] // size)
    offsets = torch.empty_like(scales)
    span = SUPER_BLOCK if isinstance(plan.grid, SuperBlockGrid) else size  # in-features whose grid is chosen at once
    block = max(span, block_size // span * span)  # a span never straddles two blocks
    for begin in range(0, work.shape[1], block):
        end = min(begin + block, work.shape[1])
        errors = work.new_empty(work.shape[0], end - begin)
        for start in range(begin, end, size):
            stop, group = start + size, start // size
            if start % span == 0:
                fitted = _fitted(work[:, start : start + span], cost[start : start + span], plan, search=search)
                scales[:, group : group + span // size], offsets[:, group : group + span // size] = fitted
            codes[:, start:stop], errors[:, start - begin : stop - begin] = _round_group(
                work[:, start:end], factor[start:stop, start:end], Grid(scales[:, group], offsets[:, group]), bits
            )
        work[:, end:] -= errors @ factor[begin:end, end:]
    grid = Grid(scales, offsets)
    if sweeps and scales.isfinite().all() and offsets.isfinite().all():
        del factor, work
        codes, grid = refine(target, damped, codes, grid, plan, sweeps=sweeps, block=block)
    return to_group_affine(codes, grid, bits, where=where, kind=plan.grid)


def _fitted(weights: Tensor, cost: Tensor, plan: Plan, *, search: bool) -> Grid:
    """The grid (out, n) of weights (out, n·g), the columns that are about to be rounded; cost: of each column."""
    groups, costs = weights.unflatten(1, (-1, plan.group_size)), cost.unflatten(0, (-1, plan.group_size))
    if isinstance(plan.grid, SuperBlockGrid):
        return fit_super_block(groups, costs, plan.grid)
    if not search:
        return fit_min_max(groups, plan.bits, sym=plan.sym)
    fitted = fit_weighted(groups[:, 0], costs[0], plan.bits, sym=plan.sym)
    return Grid(fitted.scale[:, None], fitted.offset[:, None])


def _round_group(work: Tensor, factor: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """Round the first g columns of work (out, n ≥ g) one by one, compensating all later ones in place.

    factor: rows of U for the group, (g, n). Returns codes and scaled errors, both (out, g).
    """
    group = factor.shape[0]
    codes, errors = torch.empty_like(work[:, :group]), torch.empty_like(work[:, :group])
    for i in range(group):
        column = work[:, i : i + 1]
        codes[:, i : i + 1] = grid.codes(column, bits)
        error = (column - grid.values(codes[:, i : i + 1])) / factor[i, i]
        errors[:, i : i + 1] = error
        work[:, i + 1 : group].addmm_(error, factor[i : i + 1, i + 1 : group], alpha=-1)
    work[:, group:] -= errors @ factor[:, group:]
    return codes, errors


def damped_hessian(hessian: Tensor, damp: float) -> Tensor:
    """H + λI, float64 (in, in), with λ = damp · mean(diag H).

    An input that was always zero says nothing about its column: it gets H_ii = 1, so the column is rounded to nearest
    and compensates nobody.
    """
    h = hessian.to(torch.float64, copy=True)
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    return h


def inverse_cholesky(damped: Tensor, *, where: str) -> Tensor:
    """U upper triangular, float64 (in, in), with damped⁻¹ = Uᵀ U.

    The factor comes from one Cholesky of H taken backwards, H = R Rᵀ with R upper, U = R⁻¹, which avoids forming the
    inverse.
    """
    h = damped.flip(0, 1)  # flip copies
    factor, failed = torch.linalg.cholesky_ex(h)
    del h  # at 11,008 in-features each matrix is 1 GB
    if int(failed) or not factor.isfinite().all():
        raise InputError(
            "the calibration Hessian is not positive definite",
            where=where,
            why="activations overflowed or the damping is too small",
            fix="raise damp, or use other calibration text",
        )
    factor = factor.flip(0, 1)
    identity = torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=True)
    return inverse
