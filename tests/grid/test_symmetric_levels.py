"""The symmetric grid of super-blocks: signed levels, an offset that follows from the scale, nothing rounded."""

import dataclasses

import numpy as np
import pytest

from qalora_export.errors import InputError
from qalora_export.grid import (
    GRIDS,
    Differences,
    GroupAffine,
    PackedAffine,
    SymmetricGrid,
    SymmetricLevels,
    centred,
    difference,
    grid_named,
)
from qalora_export.grid.named import SUPER_BLOCK

GRID = GRIDS["q6_k"]
assert isinstance(GRID, SymmetricGrid)


def symmetric_matrix(rows: int = 3, blocks: int = 2, seed: int = 0, grid: SymmetricGrid = GRID) -> GroupAffine:
    """Any codes, levels of both signs."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(-grid.top - 1, grid.top + 1, (rows, blocks * grid.groups)).astype(np.int8)
    steps = rng.normal(0, 1e-3, (rows, blocks)).astype(np.float16)
    codes = rng.integers(0, 2**grid.bits, (rows, blocks * SUPER_BLOCK)).astype(np.uint8)
    return GroupAffine.on_levels(codes, SymmetricLevels(grid, levels, steps))


def test_a_weight_is_exact() -> None:
    matrix = symmetric_matrix()
    levels = matrix.levels
    assert isinstance(levels, SymmetricLevels) and isinstance(GRID, SymmetricGrid)
    step = levels.scale_step.astype(np.float64).repeat(SUPER_BLOCK, axis=1)
    level = levels.scale.astype(np.float64).repeat(GRID.group_size, axis=1)
    exact = step * level * (matrix.codes.astype(np.float64) - 32)
    np.testing.assert_array_equal(matrix.dequantize(), exact)
    np.testing.assert_array_equal(centred(matrix), exact)
    middle = (matrix.codes == 32) & (step * level < 0)
    assert middle.any()
    assert np.signbit(centred(matrix)[middle]).all()
    assert matrix.is_symmetric


def test_bits_per_weight_are_those_of_the_block() -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    assert isinstance(GRID, SymmetricGrid)
    size, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[GRID.gguf]]
    assert GRID.bits_per_weight(GRID.bits, GRID.group_size) == 8 * nbytes / size
    assert GRID.top == 127
    with pytest.raises(InputError, match="has 6 bits in groups of 16"):
        grid_named("q6_k", 6, 32, where="m")


def test_differences_are_those_of_levels_and_steps() -> None:
    one = symmetric_matrix()
    assert isinstance(one.levels, SymmetricLevels)
    doubled = dataclasses.replace(one.levels, scale_step=one.levels.scale_step * np.float16(2))
    other = GroupAffine.on_levels(one.codes, doubled)
    assert difference(one, one).total == 0
    assert difference(one, other) == Differences(0, one.levels.scale_step.size, 0)
    assert difference(PackedAffine.pack(one).unpack(), one).total == 0


def test_what_is_no_grid_is_refused() -> None:
    levels = symmetric_matrix().levels
    assert isinstance(levels, SymmetricLevels)
    for change in (
        {"scale": levels.scale.astype(np.uint8)},
        {"scale": levels.scale[:, 1:]},
        {"scale_step": levels.scale_step[:, :1]},
        {"scale_step": np.full_like(levels.scale_step, np.inf)},
    ):
        with pytest.raises(InputError, match="not a grid of super-blocks"):
            dataclasses.replace(levels, **change)
