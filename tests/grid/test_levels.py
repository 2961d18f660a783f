"""Grids of super-blocks: products, projection, what is refused, what differs."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_export.errors import InputError
from qalora_export.grid import (
    AFFINE16,
    GRIDS,
    Differences,
    GroupAffine,
    Levels,
    PackedAffine,
    SuperBlockGrid,
    difference,
    grid_named,
    packed_difference,
    project,
)
from qalora_export.grid.named import SUPER_BLOCK

SUPER = [grid for grid in GRIDS.values() if isinstance(grid, SuperBlockGrid) and not grid.symmetric]
every_grid = pytest.mark.parametrize("grid", SUPER, ids=[grid.name for grid in SUPER])


def levels_of(grid: SuperBlockGrid, seed: int = 0, rows: int = 3, blocks: int = 2) -> Levels:
    """A top level in every super-block, as projection leaves it."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, grid.top + 1, (2, rows, blocks, grid.groups), np.uint8)
    levels[..., 0] = grid.top
    steps = rng.uniform(1e-4, 1e-2, (2, rows, blocks)).astype(np.float16)
    return Levels(grid, *levels.reshape(2, rows, -1), *steps)


@every_grid
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_lies_on_the_grid_is_projected_onto_itself(grid: SuperBlockGrid, seed: int) -> None:
    levels = levels_of(grid, seed)
    for products, level, step in (
        (levels.scales(), levels.scale, levels.scale_step),
        (-levels.offsets(), levels.offset, levels.offset_step),
    ):
        found_level, found_step = project(products.astype(np.float64), grid)
        assert np.array_equal(found_level, level)
        assert np.array_equal(found_step, step)


@every_grid
def test_projection_by_hand(grid: SuperBlockGrid) -> None:
    top, values = grid.top, np.zeros((1, grid.groups))
    values[0, :5] = 2.0 * top, 4.9, 5.1, 3.0, -7.0
    levels, step = project(values, grid)
    assert step.tolist() == [[2.0]]
    assert levels[0, :5].tolist() == [top, 2, 3, 2, 0]  # 1.5 goes to 2 as ties go to even; below 0 there is nothing
    nothing = project(-values, grid)
    assert (nothing[0][0, :4] == 0).all()
    assert np.isinf(project(values * 1e6, grid)[1]).all()
    zero = project(np.zeros((2, grid.groups)), grid)
    assert not zero[0].any()
    assert not zero[1].any()


@every_grid
def test_products_are_exact(grid: SuperBlockGrid) -> None:
    levels = levels_of(grid)
    step = levels.scale_step.astype(np.float64).repeat(grid.groups, axis=1)
    np.testing.assert_array_equal(levels.scales().astype(np.float64), step * levels.scale)
    assert np.signbit(levels.offsets()).all()


@every_grid
def test_bits_per_weight_and_what_divides(grid: SuperBlockGrid) -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    size, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[grid.gguf]]
    assert size == SUPER_BLOCK
    assert grid.bits_per_weight(grid.bits, grid.group_size) == 8 * nbytes / size
    assert grid.divides(512, grid.group_size)
    assert not grid.divides(576, grid.group_size)
    assert AFFINE16.divides(576, 32)
    assert AFFINE16.bits_per_weight(4, 32) == 5


@every_grid
def test_differences_are_those_of_levels_and_steps(grid: SuperBlockGrid) -> None:
    levels = levels_of(grid)
    codes = np.zeros((3, 2 * SUPER_BLOCK), np.uint8)
    one = GroupAffine.on_levels(codes, levels)
    doubled = dataclasses.replace(levels, scale_step=(levels.scale_step * np.float16(2)))
    other = GroupAffine.on_levels(codes, doubled)
    assert difference(one, one).total == 0
    assert difference(one, other) == Differences(0, levels.scale_step.size, 0)
    assert packed_difference(PackedAffine.pack(one), PackedAffine.pack(other)) == difference(one, other)
    free = GroupAffine(codes, *np.ones((2, *levels.scale.shape), np.float16), 4)
    assert difference(one, free) == Differences(0, levels.scale.size, levels.offset.size)
    assert difference(PackedAffine.pack(one).unpack(), one).total == 0


@every_grid
def test_what_is_no_grid_is_refused(grid: SuperBlockGrid) -> None:
    good = levels_of(grid)
    for change in (
        {"scale": good.scale[:, 1:]},
        {"scale": good.scale.astype(np.int8)},
        {"offset": good.offset[1:]},
        {"scale_step": good.scale_step[:, :1]},
        {"offset_step": good.offset_step.astype(np.float32)},
        {"offset": np.full_like(good.offset, grid.top + 1)},
        {"scale_step": np.full_like(good.scale_step, np.nan)},
    ):
        with pytest.raises(InputError, match="not a grid of super-blocks"):
            dataclasses.replace(good, **change)
    matrix = GroupAffine.on_levels(np.zeros((3, 2 * SUPER_BLOCK), np.uint8), good)
    with pytest.raises(InputError, match="not those of the levels"):
        dataclasses.replace(matrix, scale=matrix.scale * np.float32(2))
    with pytest.raises(InputError, match=f"has {grid.bits} bits"):
        grid_named(grid.name, 8, grid.group_size, where="m")
    with pytest.raises(InputError, match="no grid"):
        grid_named(["q4_k"], 4, 32, where="m")
