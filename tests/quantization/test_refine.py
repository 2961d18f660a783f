"""Sweeps after GPTQ against dense numpy: one row, one column at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qalora_export.grid import GRIDS, SuperBlockGrid
from qalora_export.quantization.grid_fit import Grid, fit_min_max, to_group_affine
from qalora_export.quantization.refine import dequantized, output_error, refine
from qalora_export.quantization.rules import Plan
from qalora_export.quantization.super_fit import fit_super_block
from tests.quantization.oracle import naive_sweep
from tests.quantization.test_gptq import problem

GROUP = 32
SUPER = [grid for grid in GRIDS.values() if isinstance(grid, SuperBlockGrid) and not grid.symmetric]


def rounded(out: int, width: int, bits: int, *, sym: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Grid]:
    """weight, hessian (damped a little), and codes and grid of rounding to nearest."""
    weight, hessian = problem(out, width, seed)
    w, h = (
        torch.from_numpy(weight).double(),
        torch.from_numpy(hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(width)),
    )
    grouped = w.unflatten(1, (-1, GROUP))
    grid = fit_min_max(grouped, bits, sym=sym)
    return w, h, grid.codes(grouped, bits).flatten(1), grid


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_agrees_with_dense_least_squares_and_column_by_column_descent(bits: int, sym: bool) -> None:
    w, h, codes, grid = rounded(5, 128, bits, sym=sym, seed=bits)
    found, new = refine(w, h, codes, grid, Plan(bits, GROUP, sym), sweeps=1, block=64)
    arrays = [part.numpy() for part in (w, h, codes, grid.scale, grid.offset)]
    expected = naive_sweep(*arrays, bits, sym=sym)
    assert np.array_equal(found.numpy(), expected[0])
    assert np.array_equal(new.scale.numpy(), expected[1])
    assert np.array_equal(new.offset.numpy(), expected[2])


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_no_row_gets_worse_and_more_sweeps_help(bits: int, sym: bool) -> None:
    w, h, codes, grid = rounded(32, 256, bits, sym=sym)
    errors = [
        output_error(dequantized(*refine(w, h, codes, grid, Plan(bits, GROUP, sym), sweeps=sweeps, block=128)) - w, h)
        for sweeps in (0, 1, 3)
    ]
    assert (errors[1] <= errors[0]).all() and (errors[2] <= errors[1]).all()
    assert float(errors[1].sum()) < 0.6 * float(errors[0].sum())


@pytest.mark.parametrize("block", [32, 96, 256])
def test_blocks_change_nothing(block: int) -> None:
    w, h, codes, grid = rounded(16, 256, 3, sym=False)
    once, again = (refine(w, h, codes, grid, Plan(3, GROUP, False), sweeps=2, block=size) for size in (128, block))
    assert torch.equal(once[0], again[0]) and torch.equal(once[1].offset, again[1].offset)


def test_constant_zero_and_lonely_groups_stay_finite() -> None:
    """A group of one value has codes that agree and a scale of 0: least squares alone would not determine it."""
    w, h, _, _ = rounded(4, 128, 4, sym=False)
    w[0, :GROUP], w[1], w[2, GROUP:] = 0.75, 0.0, 1e-7
    grouped = w.unflatten(1, (-1, GROUP))
    grid = fit_min_max(grouped, 4, sym=False)
    codes, new = refine(w, h, grid.codes(grouped, 4).flatten(1), grid, Plan(4, GROUP, False), sweeps=2, block=128)
    assert new.scale.isfinite().all() and new.offset.isfinite().all() and (new.scale >= 0).all()
    assert ((codes >= 0) & (codes <= 15)).all()
    assert torch.equal(dequantized(codes, new)[1], w[1])


@pytest.mark.parametrize("kind", SUPER, ids=[grid.name for grid in SUPER])
def test_on_super_blocks_no_row_gets_worse_and_the_grid_is_kept(kind: SuperBlockGrid) -> None:
    w, h, _, _ = rounded(16, 512, kind.bits, sym=False)
    plan = Plan(kind.bits, kind.group_size, False, kind)
    grouped = w.unflatten(1, (-1, kind.group_size))
    grid = fit_super_block(grouped, torch.ones_like(grouped[0]), kind)
    codes = grid.codes(grouped, kind.bits).flatten(1)
    errors = []
    for sweeps in (0, 1, 3):
        found, new = refine(w, h, codes, grid, plan, sweeps=sweeps, block=256)
        to_group_affine(
            found, new, kind.bits, where="w", kind=kind
        )  # InputError where a scale or offset is off the grid
        errors.append(output_error(dequantized(found, new) - w, h))
    assert (errors[1] <= errors[0]).all() and (errors[2] <= errors[1]).all()
    assert float(errors[1].sum()) < 0.6 * float(errors[0].sum())
