"""Grids of super-blocks ↔ K-quants: nothing differs, judged by the gguf package and by ggml's own bit twiddling."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.gguf.super_blocks import SuperBlockType
from qalora_export.formats.gguf.types import BLOCK_TYPES, Q4_1, exact_type
from qalora_export.grid import GroupAffine, Levels, PackedAffine, difference, differing, pack_codes
from qalora_export.grid.named import SUPER_BLOCK
from tests.formats.gguf.strategies import finite_fp16

TYPES = {
    name: kind
    for name, kind in BLOCK_TYPES.items()
    if issubclass(kind, SuperBlockType) and not kind.grid.symmetric  # test_symmetric_blocks.py
}
every_type = pytest.mark.parametrize("kind", list(TYPES.values()), ids=list(TYPES))


def random_matrix(kind: Any, rows: int, blocks: int, seed: int) -> GroupAffine:
    """Random bytes in every place, steps of any size."""
    rng, grid = np.random.default_rng(seed), kind.grid
    levels = rng.integers(0, grid.top + 1, (2, rows, blocks * grid.groups), np.uint8)
    steps = (rng.normal(size=(2, rows, blocks)) * 2.0 ** rng.integers(-20, 8, (2, rows, blocks))).astype(np.float16)
    codes = rng.integers(0, 2**grid.bits, (rows, blocks * SUPER_BLOCK), np.uint8)
    return GroupAffine.on_levels(codes, Levels(grid, *levels, *steps))


def oracle(kind: type[SuperBlockType], rows: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """codes (out, in), s and m (out, in/g), one block at a time."""
    size = kind.block_bytes
    blocks = [[kind.slow_unpack(row[at : at + size]) for at in range(0, len(row), size)] for row in map(bytes, rows)]
    codes, scale, offset = (np.array([np.concatenate([b[part] for b in row]) for row in blocks]) for part in range(3))
    return codes, scale, offset


@every_type
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 3), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_round_trip_oracle_and_the_gguf_package(kind: Any, rows: int, blocks: int, seed: int) -> None:
    matrix = random_matrix(kind, rows, blocks, seed)
    packed = PackedAffine.pack(matrix)
    stored = kind.pack(packed)
    assert stored.shape == (rows, blocks * kind.block_bytes)
    codes, scale, offset = oracle(kind, stored)
    np.testing.assert_array_equal(codes, matrix.codes)
    np.testing.assert_array_equal(scale, matrix.scale)  # in float64: the products are exact
    np.testing.assert_array_equal(offset, matrix.offset)
    back = kind.unpack(stored, bits=matrix.bits, group_size=matrix.group_size)
    assert difference(matrix, back.unpack()).total == 0
    assert kind.holds(packed)
    assert differing(dequantize(stored, GGMLQuantizationType(kind.id)), matrix.dequantize()) == 0


@every_type
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bytes_are_read_as_the_gguf_package_reads_them(kind: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (3, 2 * kind.block_bytes), np.uint8).view(kind.layout)
    for part in ("d", "dmin"):
        blocks[part] = rng.normal(size=blocks.shape).astype(np.float16).view("<u2")
    stored = blocks.view(np.uint8)
    bits, group = kind.native()
    matrix = kind.unpack(stored, bits=bits, group_size=group)
    np.testing.assert_array_equal(dequantize(stored, GGMLQuantizationType(kind.id)), matrix.unpack().dequantize())
    assert np.array_equal(kind.pack(matrix), stored)


@every_type
def test_every_code_and_level_goes_to_its_place(kind: Any) -> None:
    """One at a time, and one bit of it at a time."""
    grid, one = kind.grid, np.ones((1, 1), np.float16)
    for element in range(SUPER_BLOCK):
        for bit in range(grid.bits):
            codes = np.zeros((1, SUPER_BLOCK), np.uint8)
            codes[0, element] = 1 << bit
            levels = Levels(grid, *np.zeros((2, 1, grid.groups), np.uint8), one, one)
            found = oracle(kind, kind.pack(PackedAffine.on_levels(pack_codes(codes, grid.bits), levels)))
            assert np.array_equal(found[0], codes)
    for group in range(grid.groups):
        for bit in range(grid.level_bits):
            for part in (0, 1):
                levels = np.zeros((2, 1, grid.groups), np.uint8)
                levels[part, 0, group] = 1 << bit
                matrix = PackedAffine.on_levels(
                    pack_codes(np.zeros((1, SUPER_BLOCK), np.uint8), grid.bits), Levels(grid, *levels, one, one)
                )
                _, scale, offset = oracle(kind, kind.pack(matrix))
                assert np.array_equal(scale, levels[0])
                assert np.array_equal(-offset, levels[1])


@every_type
@settings(max_examples=30, deadline=None)
@given(steps=finite_fp16((2, 1)), seed=st.integers(0, 999))
def test_a_weight_is_rounded_once_whatever_the_steps(kind: Any, steps: NDArray[np.float16], seed: int) -> None:
    """float32(d·k·q − dmin·l), the difference of exact products."""
    matrix = random_matrix(kind, 1, 1, seed)
    assert matrix.levels is not None
    levels = dataclasses.replace(matrix.levels, scale_step=steps[None, 0], offset_step=steps[None, 1])
    matrix = GroupAffine.on_levels(matrix.codes, levels)
    q = matrix.codes.reshape(1, -1, matrix.group_size).astype(np.float64)
    d, dmin = steps.astype(np.float64)
    exact = d * levels.scale[..., None] * q - dmin * levels.offset[..., None]  # 11 + 6 + 4 bits and 11 + 6: exact
    np.testing.assert_array_equal(matrix.dequantize(), exact.astype(np.float32).reshape(1, -1))


@every_type
def test_what_is_refused(kind: Any) -> None:
    matrix = PackedAffine.pack(random_matrix(kind, 1, 1, 0))
    free = PackedAffine(matrix.codes, *np.ones((2, *matrix.scale.shape), np.float16), matrix.bits, matrix.group_size)
    with pytest.raises(InputError, match=f"grid affine16 does not go into {kind.name}"):
        kind.pack(free)
    with pytest.raises(InputError, match=f"grid {kind.grid.name} does not go into Q4_1"):
        Q4_1.pack(matrix)
    assert not kind.holds(free)
    assert not any(other.holds(matrix) for name, other in BLOCK_TYPES.items() if name != kind.name)
    assert exact_type(matrix.bits, lambda: matrix, where="w", grid=matrix.grid) is kind
    with pytest.raises(UnsafeInputError, match="3 bits in groups of 32 declared"):
        kind.unpack(kind.pack(matrix), bits=3, group_size=32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["d", "dmin"])
@every_type
def test_a_step_that_is_no_number_is_refused(kind: Any, part: str, bad: float) -> None:
    blocks = np.zeros((1, kind.block_bytes), np.uint8).view(kind.layout)
    blocks[part] = np.float16([bad]).view("<u2")
    bits, group = kind.native()
    with pytest.raises(UnsafeInputError, match="NaN or infinite"):
        kind.unpack(blocks.view(np.uint8), bits=bits, group_size=group)
