"""After GPTQ: scale and offset of all groups of a row solved together, then every code chosen anew; repeated.

GPTQ fixes a group's grid before it has seen the later columns, and a code before the later codes. Both are undone here
under the same objective, the error of the layer's output, row by row with E = Ŵ − W and P = E H:

    error = E H Eᵀ
    grid     least squares: ŵ = s_g·q + m_g is linear in the 2·in/g numbers (s, m) of a row
    codes    coordinate descent: column i alone is best at  ŵ_i − P_i / H_ii, rounded to its grid

Neither step raises the error of a row: a grid that rounding to fp16, or to the levels of super-blocks, made worse is
not taken. This is the alternating descent of CDQuant (arXiv 2406.17542) and of layer-wise least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_export.grid import SuperBlockGrid
from qalora_export.grid.projection import projected
from qalora_export.quantization.grid_fit import Grid
from qalora_export.quantization.rules import Plan
from qalora_export.quantization.super_fit import snapped

SOLVE_BYTES = 256 << 20  # of temporaries in one batch of rows
RIDGE = 1e-9  # of the diagonal: a group whose codes all agree leaves s and m undetermined


def refine(
    weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, plan: Plan, *, sweeps: int, block: int
) -> tuple[Tensor, Grid]:
    """Better codes (out, in) and grid (out, in/g) for weight (out, in) under hessian (in, in), all float64.

    hessian is the damped one that GPTQ used. sweeps: how often both steps are done. block: columns between updates of
    the columns beyond, a multiple of g; it changes nothing but the speed.
    """
    for _ in range(sweeps):
        grid = _solved(weight, hessian, codes, grid, plan)
        codes = _descended(weight, hessian, codes, grid, plan.bits, block)
    return codes, _solved(weight, hessian, codes, grid, plan) if sweeps else grid


def dequantized(codes: Tensor, grid: Grid) -> Tensor:
    """s·q + m, float64 (out, in)."""
    grouped = codes.unflatten(1, (grid.scale.shape[1], -1))
    return grid.values(grouped).flatten(1)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """E H Eᵀ of every row, (out,)."""
    return ((error @ hessian) * error).sum(1)


def _solved(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, plan: Plan) -> Grid:
    """The grid with the least output error for these codes, rounded to what the plan's grid has; rows that it does not
    help keep theirs.
    """
    bits, sym = plan.bits, plan.sym
    groups, size = grid.scale.shape[1], codes.shape[1] // grid.scale.shape[1]
    middle = 2 ** (bits - 1)
    scale, offset = grid.scale.clone(), grid.offset.clone()
    rows = max(1, SOLVE_BYTES // (8 * groups * (hessian.shape[0] + 4 * groups)))
    by_group = hessian.view(groups, size, groups, size)
    ones = by_group.sum((1, 3))  # (groups, groups): how the offsets of two groups act together
    for start in range(0, len(codes), rows):
        part = slice(start, start + rows)
        was = Grid(grid.scale[part], grid.offset[part])
        error = dequantized(codes[part], was) - weight[part]
        pull = (error @ hessian).unflatten(1, (groups, size))  # P
        q = codes[part].unflatten(1, (groups, size))
        if sym:
            q = q - middle
        pushed = torch.einsum("rgi,gihj->rghj", q, by_group)
        matrix = torch.einsum("rghj,rhj->rgh", pushed, q)
        target = (pull * q).sum(-1)
        if not sym:
            cross = pushed.sum(-1)  # [scale of g, offset of h]
            top, bottom = torch.cat([matrix, cross], 2), torch.cat([cross.mT, ones.expand(len(q), -1, -1)], 2)
            matrix, target = torch.cat([top, bottom], 1), torch.cat([target, pull.sum(-1)], 1)
        step = _least_squares(matrix, target)
        if sym:
            new = snapped(Grid(was.scale - step, was.offset), plan.grid)
            new = Grid(new.scale, -float(middle) * new.scale)
        elif isinstance(plan.grid, SuperBlockGrid):
            real = Grid(was.scale - step[:, :groups], was.offset - step[:, groups:])
            new = _on_super_blocks(real, weight[part], hessian, codes[part], ones, plan.grid)
        else:
            new = snapped(Grid(was.scale - step[:, :groups], was.offset - step[:, groups:]), plan.grid)
        now = dequantized(codes[part], new) - weight[part]
        better = (output_error(now, hessian) < (error * pull.flatten(1)).sum(1)) & (new.scale >= 0).all(1)
        scale[part] = torch.where(better[:, None], new.scale, was.scale)
        offset[part] = torch.where(better[:, None], new.offset, was.offset)
    return Grid(scale, offset)


def _on_super_blocks(
    real: Grid, weight: Tensor, hessian: Tensor, codes: Tensor, ones: Tensor, kind: SuperBlockGrid
) -> Grid:
    """Scales to their levels first; then the offsets that are best beside those, and these to their levels."""
    scale = projected(real.scale, kind)
    error = dequantized(codes, Grid(scale, real.offset)) - weight
    pull = (error @ hessian).unflatten(1, (ones.shape[0], -1)).sum(-1)
    step = _least_squares(ones.expand(len(pull), -1, -1).clone(), pull)
    return snapped(Grid(scale, real.offset - step), kind)


def _least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """x of matrix · x = target, batched; not finite where that fails, which no row then takes."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * (diagonal + diagonal.mean(1, keepdim=True))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solved = torch.cholesky_solve(target[..., None], factor)[..., 0]
    return torch.where(failed[:, None] == 0, solved, torch.nan)


def _descended(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, bits: int, block: int) -> Tensor:
    """One pass of coordinate descent over the columns, in order."""
    codes, size = codes.clone(), codes.shape[1] // grid.scale.shape[1]
    pull = (dequantized(codes, grid) - weight) @ hessian  # P
    diagonal = hessian.diagonal()
    for begin in range(0, codes.shape[1], block):
        end = min(begin + block, codes.shape[1])
        local, moved = pull[:, begin:end].clone(), torch.zeros_like(pull[:, begin:end])
        inside = hessian[begin:end, begin:end]
        for i in range(begin, end):
            column = Grid(grid.scale[:, i // size], grid.offset[:, i // size])
            value = column.values(codes[:, i : i + 1])
            wanted = value - local[:, i - begin : i - begin + 1] / diagonal[i]
            codes[:, i : i + 1] = column.codes(wanted, bits)
            change = column.values(codes[:, i : i + 1]) - value
            moved[:, i - begin : i - begin + 1] = change
            local.addmm_(change, inside[i - begin : i - begin + 1])
        pull += moved @ hessian[begin:end]
    return codes
