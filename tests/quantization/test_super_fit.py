"""Grids of super-blocks: what is fitted lies on the grid, costs little more than a free grid, and is never nonsense."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qalora_export.errors import InputError
from qalora_export.grid import GRIDS, SuperBlockGrid, factor, project
from qalora_export.grid.projection import projected
from qalora_export.quantization.gptq import gptq
from qalora_export.quantization.grid_fit import Grid, to_group_affine
from qalora_export.quantization.rtn import round_to_nearest
from qalora_export.quantization.rules import Plan
from qalora_export.quantization.super_fit import fit_super_block, snapped
from tests.quantization.test_gptq import problem

SUPER = [grid for grid in GRIDS.values() if isinstance(grid, SuperBlockGrid) and not grid.symmetric]
every_grid = pytest.mark.parametrize("kind", SUPER, ids=[grid.name for grid in SUPER])


def plans(kind: SuperBlockGrid) -> tuple[Plan, Plan]:
    """On this grid, and on the free one with as many bits and groups."""
    return Plan(kind.bits, kind.group_size, False, kind), Plan(kind.bits, kind.group_size, False)


def error_of(matrix: Tensor, weight: Tensor, hessian: Tensor) -> float:
    error = matrix.double() - weight
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())


@every_grid
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(-26, 9))
def test_torch_projects_as_numpy_does(kind: SuperBlockGrid, seed: int, size: int) -> None:
    """At any size, float16's smallest numbers and its end included."""
    values = np.random.default_rng(seed).normal(0.5, 1, (3, 2 * kind.groups)) * 2.0**size
    levels, step = project(values, kind)
    wide = step.astype(np.float64).repeat(kind.groups, axis=1)
    found = projected(torch.from_numpy(values), kind).numpy()
    np.testing.assert_array_equal(found, levels * wide)
    again, steps = factor(found, kind, where="w")  # steps may be others: 2·3 is also 1·6
    np.testing.assert_array_equal(again * steps.astype(np.float64).repeat(kind.groups, axis=1), found)


@every_grid
def test_numbers_beside_the_grid_are_no_levels(kind: SuperBlockGrid) -> None:
    values = projected(torch.rand(2, kind.groups, dtype=torch.float64), kind).numpy()
    values[1, 0] *= 1 + 2.0**-20
    with pytest.raises(InputError, match=f"1 super-blocks do not lie on grid {kind.name}"):
        factor(values, kind, where="w")


@every_grid
def test_it_costs_little_more_than_a_free_grid(kind: SuperBlockGrid) -> None:
    """A free grid has half a bit more per weight; levels cost less than a tenth of the error that half a bit saves."""
    weight, hessian = (torch.from_numpy(part).double() for part in problem(64, 512))
    on_levels, free = (gptq(weight, hessian, plan, where="w", sweeps=1) for plan in plans(kind))
    ratio = error_of(torch.from_numpy(on_levels.dequantize()), weight, hessian) / error_of(
        torch.from_numpy(free.dequantize()), weight, hessian
    )
    assert 0.8 < ratio < 1.35
    assert on_levels.levels is not None
    nearest = round_to_nearest(weight, plans(kind)[0], where="w")
    assert error_of(torch.from_numpy(on_levels.dequantize()), weight, hessian) < 0.8 * error_of(
        torch.from_numpy(nearest.dequantize()), weight, hessian
    )


@every_grid
def test_blocks_change_nothing(kind: SuperBlockGrid) -> None:
    weight, hessian = (torch.from_numpy(part) for part in problem(8, 512))
    once, again = (
        gptq(weight, hessian, plans(kind)[0], where="w", block_size=size, sweeps=1).dequantize() for size in (32, 512)
    )
    assert np.allclose(once, again, atol=1e-6)


@every_grid
@pytest.mark.parametrize("value", [0.0, 0.25, -0.25, 1e-7, -1e-7, 3000.0, -3000.0])
def test_constants_of_any_size_stay_near_what_they_are(kind: SuperBlockGrid, value: float) -> None:
    """Also those that a minimum ≤ 0 cannot reach by itself, and those that only float16's smallest steps reach."""
    weight = torch.full((2, 256), value, dtype=torch.float64)
    found = round_to_nearest(weight, plans(kind)[0], where="w").dequantize()
    assert np.abs(found - value).max() <= 0.01 * abs(value) + 32 * 2.0**-24


@every_grid
def test_a_better_fit_is_never_worse_than_the_snapped_free_one(kind: SuperBlockGrid) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(32, kind.groups, kind.group_size, generator=generator, dtype=torch.float64)
    importance = torch.rand(kind.groups, kind.group_size, generator=generator, dtype=torch.float64) + 0.1
    found = fit_super_block(groups, importance, kind)
    assert torch.equal(snapped(found, kind).scale, found.scale)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1)
    plain = snapped(Grid((high - low) / (2**kind.bits - 1), low), kind)

    def cost(grid: Grid) -> Tensor:
        error = grid.values(grid.codes(groups, kind.bits)) - groups
        return (error.square() * importance).sum((1, 2))

    assert (cost(found) <= cost(plain)).float().mean() > 0.95
    assert float(cost(found).sum()) < 0.9 * float(cost(plain).sum())


@every_grid
def test_weights_beyond_float16_are_refused(kind: SuperBlockGrid) -> None:
    with pytest.raises(InputError, match="too large for fp16"):
        round_to_nearest(torch.full((1, 256), 1e9, dtype=torch.float64), plans(kind)[0], where="w")
    codes = torch.zeros(1, 256)
    off = Grid(torch.full((1, kind.groups), 1 / 3, dtype=torch.float64), torch.zeros(1, kind.groups))
    with pytest.raises(InputError, match="do not lie on grid"):
        to_group_affine(codes, off, kind.bits, where="w", kind=kind)
