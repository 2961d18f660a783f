"""Training on a grid of super-blocks: forward pass and gradients, merging, the independent check of a merge."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qalora_export.errors import InputError
from qalora_export.grid import GRIDS, GroupAffine, Levels, SuperBlockGrid, difference, pack_codes, unpack_codes
from qalora_export.grid.named import SUPER_BLOCK
from qalora_export.grid.packed_affine import PackedAffine
from qalora_export.qalora.adapter_files import ModuleAdapter
from qalora_export.qalora.layer import QALoraLinear
from qalora_export.qalora.merge import merged
from qalora_export.qalora.super_blocks import effective_levels
from qalora_export.verify.reference.recomputed import Move, wrong_levels, wrong_numbers

SUPER = [grid for grid in GRIDS.values() if isinstance(grid, SuperBlockGrid) and not grid.symmetric]
every_grid = pytest.mark.parametrize("grid", SUPER, ids=[grid.name for grid in SUPER])
OUT, BLOCKS, RANK = 6, 2, 3


def matrix_on(grid: SuperBlockGrid, seed: int = 0) -> GroupAffine:
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, grid.top + 1, (2, OUT, BLOCKS * grid.groups), np.uint8)
    steps = rng.uniform(1e-4, 1e-2, (2, OUT, BLOCKS)).astype(np.float16)
    levels[1, 0], steps[1, 1] = 0, 0  # rows without offsets
    codes = rng.integers(0, 2**grid.bits, (OUT, BLOCKS * SUPER_BLOCK), np.uint8)
    return GroupAffine.on_levels(codes, Levels(grid, *levels, *steps))


def layer_of(matrix: GroupAffine) -> QALoraLinear:
    levels = matrix.levels
    assert levels is not None
    out, columns = matrix.shape
    layer = QALoraLinear(columns, out, bits=matrix.bits, group_size=matrix.group_size, grid=levels.grid.name)
    layer.codes.copy_(torch.from_numpy(pack_codes(matrix.codes, matrix.bits)))
    for part in ("scale", "offset", "scale_step", "offset_step"):
        getattr(layer, part).copy_(torch.from_numpy(getattr(levels, part)))
    return layer


def trained(matrix: GroupAffine, size: float = 0.05, pool: int | None = None) -> QALoraLinear:
    layer, generator = layer_of(matrix), torch.Generator().manual_seed(1)
    layer.attach_adapter(RANK, 2.0 * RANK, pool=pool, generator=generator)
    assert layer.lora_B is not None
    layer.lora_B.data.normal_(0, size, generator=generator)
    return layer


def naive_numbers(levels: Tensor, steps: Tensor, change: np.ndarray, grid: SuperBlockGrid) -> np.ndarray:
    """step · level next to that of the base + change (out, in/g), one super-block at a time, in Python's float."""
    numbers = np.zeros(change.shape)
    for row in range(OUT):
        for block in range(BLOCKS):
            groups, step = range(block * grid.groups, (block + 1) * grid.groups), float(steps[row, block])
            before = [step * int(levels[row, g]) for g in groups]
            wanted = [max(0.0, was + float(change[row, g])) for was, g in zip(before, groups, strict=True)]
            now = step * (max(wanted) / max(before)) if max(before) else max(wanted) / grid.top
            now = float(np.float16(np.float32(now)))
            for g, want in zip(groups, wanted, strict=True):
                numbers[row, g] = now * min(grid.top, round(want / now)) if now else 0.0
    return numbers


def naive_offsets(layer: QALoraLinear, grid: SuperBlockGrid) -> np.ndarray:
    """−step · level (out, in/g)."""
    assert layer.lora_A is not None and layer.lora_B is not None
    delta = layer.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
    delta = delta.repeat_interleave(layer.pool // layer.group_size, dim=1).numpy()
    return -naive_numbers(layer.offset, layer.offset_step, -delta, grid)


@every_grid
@pytest.mark.parametrize("size", [1e-4, 0.05, 1.0])
def test_offsets_are_those_of_a_slow_oracle(grid: SuperBlockGrid, size: float) -> None:
    matrix = matrix_on(grid)
    for pool in (None, 2 * grid.group_size):
        layer = trained(matrix, size, pool)
        np.testing.assert_array_equal(layer.effective_offset().double().numpy(), naive_offsets(layer, grid))


@every_grid
def test_an_adapter_that_moves_nothing_is_the_base_bit_for_bit(grid: SuperBlockGrid) -> None:
    """Whatever the base's levels are: also where none is at the top, as in files of other tools."""
    matrix = matrix_on(grid)
    assert matrix.levels is not None
    low = dataclasses.replace(matrix.levels, offset=matrix.levels.offset // 3)
    for levels in (matrix.levels, low):
        layer = layer_of(GroupAffine.on_levels(matrix.codes, levels))
        layer.attach_adapter(RANK, 1.0)
        assert layer.lora_A is not None and layer.lora_B is not None
        found = effective_levels(layer.offset, layer.offset_step, layer.lora_A.data, layer.lora_B.data, 1.0, grid)
        shape = (OUT, BLOCKS, grid.groups)
        real = (levels.offsets() < 0).reshape(shape).any(-1)  # a step or levels without the other mean nothing
        assert np.array_equal(found[0].numpy().reshape(shape)[real], levels.offset.reshape(shape)[real])
        assert np.array_equal(found[1].numpy()[real], levels.offset_step[real])
        np.testing.assert_array_equal(layer.effective_offset().numpy(), levels.offsets())


@every_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_is_the_merged_matrix(grid: SuperBlockGrid, dtype: torch.dtype) -> None:
    matrix = matrix_on(grid)
    layer = trained(matrix)
    assert layer.lora_A is not None and layer.lora_B is not None
    adapter = ModuleAdapter(layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling)
    result = merged(matrix, adapter, where="m")
    assert difference(matrix, result).codes == difference(matrix, result).scale == 0
    assert difference(matrix, result).offset > 0
    expected = torch.from_numpy(result.dequantize())
    assert torch.equal(layer.dequantized(torch.float32), expected)
    x = torch.randn(5, matrix.shape[1], dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), x @ expected.to(dtype).T)
    with torch.no_grad():
        assert torch.equal(layer(x), layer_of(result)(x))
    assert torch.equal(layer_of(matrix).dequantized(torch.float32), torch.from_numpy(matrix.dequantize()))


@every_grid
def test_gradients_pass_straight_through_the_grid(grid: SuperBlockGrid) -> None:
    layer = trained(matrix_on(grid))
    assert layer.lora_A is not None and layer.lora_B is not None
    x = torch.randn(7, layer.in_features, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    offset = layer.effective_offset().double()
    exact = layer.scaling * (b @ a)
    through = offset + exact - exact.detach()  # the value of the grid, the slope of the real number
    scale = (layer.scale.unflatten(1, (BLOCKS, -1)) * layer.scale_step.double()[..., None]).flatten(1)
    weight = layer.dequantized(torch.float64) + (through - through.detach()).repeat_interleave(layer.group_size, 1)
    assert scale.shape == offset.shape
    other = x.detach().clone().requires_grad_()
    (other @ weight.T).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.lora_A.grad.double(), a.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.lora_B.grad.double(), b.grad, rtol=1e-4, atol=1e-6)


@every_grid
def test_numbers_stay_what_they_are_when_devices_and_dtypes_change(grid: SuperBlockGrid) -> None:
    layer = trained(matrix_on(grid))
    before: Tensor = layer.dequantized(torch.float32)
    assert torch.equal(layer.half().dequantized(torch.float32), before)
    assert {str(p.dtype) for p in layer.packed} == {"torch.uint8", "torch.float16"}
    assert f"grid={grid.name}" in repr(layer)
    with pytest.raises(InputError, match=r"576 in-features do not divide"):
        QALoraLinear(576, 8, bits=grid.bits, group_size=grid.group_size, grid=grid.name)


@every_grid
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from((1e-5, 1e-3, 0.05, 1.0)))
def test_the_independent_check_agrees_and_finds_one_wrong_number(grid: SuperBlockGrid, seed: int, size: float) -> None:
    rng, matrix = np.random.default_rng(seed), matrix_on(grid, seed % 1000)
    a = rng.normal(size=(RANK, BLOCKS * grid.groups)).astype(np.float32)
    b = (rng.normal(size=(OUT, RANK)) * size).astype(np.float32)
    result = merged(matrix, ModuleAdapter(torch.from_numpy(a), torch.from_numpy(b), 2.0), where="m").levels
    base = matrix.levels
    assert base is not None and result is not None

    def wrong(found: Levels, scaling: float = 2.0) -> int:
        by, terms = Move.of(a, b, scaling, BLOCKS * grid.groups)
        return wrong_levels((base.offset, base.offset_step), (found.offset, found.offset_step), Move(-by, terms), grid)

    assert wrong(result) == 0
    level = result.offset.copy()
    level[2, 1] = level[2, 1] - 1 if level[2, 1] else 1
    assert wrong(dataclasses.replace(result, offset=level)) == 1
    step = result.offset_step.copy()
    step.reshape(-1)[step.argmax()] *= np.float16(1.01)  # the largest: a row that is all zero has a step of zero
    assert wrong(dataclasses.replace(result, offset_step=step)) >= 1
    if size > 1e-3:
        assert wrong(result, 1.0) > 1
        assert wrong(base) > 1


@every_grid
def test_an_offset_beyond_float16_is_refused(grid: SuperBlockGrid) -> None:
    matrix = matrix_on(grid)
    a = torch.ones(1, BLOCKS * grid.groups)
    b = torch.zeros(OUT, 1)
    b[2] = -1e8
    with pytest.raises(InputError, match="does not fit in float16") as caught:
        merged(matrix, ModuleAdapter(a, b, 1.0), where="q_proj")
    assert "q_proj.offset_step: row 2, super-block 0" in str(caught.value)


def naive_scales(layer: QALoraLinear, grid: SuperBlockGrid) -> tuple[np.ndarray, np.ndarray]:
    """scale and offset (out, in/g) where both are trained, by qalora/scales.py, in numpy and one number at a time."""
    assert layer.scales is not None and layer.lora_A is not None and layer.lora_B is not None
    codes = unpack_codes(layer.codes.numpy(), layer.bits).reshape(OUT, -1, layer.group_size).astype(np.float64)
    centre, spread = (part.astype(np.float32).astype(float) for part in (codes.mean(-1), codes.std(-1).clip(1)))
    repeat = layer.pool // layer.group_size
    by, turn = (
        np.repeat(layer.scaling * (b.detach().double() @ a.detach().double()).numpy(), repeat, axis=1)
        for a, b in ((layer.lora_A, layer.lora_B), layer.scales.pair)
    )

    before = naive_numbers(layer.scale, layer.scale_step, 0 * turn, grid)
    scale = naive_numbers(layer.scale, layer.scale_step, turn / spread, grid)
    return scale, -naive_numbers(layer.offset, layer.offset_step, centre * (scale - before) - by, grid)


@every_grid
@pytest.mark.parametrize("size", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("pool", [1, 2])
def test_scales_are_trained_next_to_the_grid_too(grid: SuperBlockGrid, size: float, pool: int) -> None:
    """Layer, merge, slow oracle and independent check say the same; the gradient passes straight through."""
    matrix = matrix_on(grid)
    layer, generator = layer_of(matrix), torch.Generator().manual_seed(1)
    layer.attach_adapter(RANK, 2.0 * RANK, pool=pool * grid.group_size, scales=True, generator=generator)
    assert layer.scales is not None and layer.lora_A is not None and layer.lora_B is not None
    assert torch.equal(layer.dequantized(torch.float32), torch.from_numpy(matrix.dequantize()))
    for part in (layer.lora_B, layer.scales.B):
        part.data.normal_(0, size, generator=generator)
    scale, offset = naive_scales(layer, grid)
    pairs = [part.detach() for part in (layer.lora_A, layer.lora_B, *layer.scales.pair)]
    adapter = ModuleAdapter(pairs[0], pairs[1], layer.scaling, (pairs[2], pairs[3]))
    result = merged(matrix, adapter, where="m")
    np.testing.assert_array_equal(result.scale.astype(float), scale)
    np.testing.assert_array_equal(result.offset.astype(float), offset)
    assert torch.equal(layer.dequantized(torch.float32), torch.from_numpy(result.dequantize()))
    assert difference(matrix, result).codes == 0 and difference(matrix, result).scale > 0
    one, other = PackedAffine.pack(matrix), PackedAffine.pack(result)
    assert wrong_numbers(one, other, adapter) == {"scale": 0, "offset": 0}
    assert result.levels is not None
    level = result.levels.scale.copy()
    level[2, 1] = level[2, 1] - 1 if level[2, 1] else 1
    spoilt = GroupAffine.on_levels(result.codes, dataclasses.replace(result.levels, scale=level))
    assert wrong_numbers(one, PackedAffine.pack(spoilt), adapter)["scale"] == 1

    x = torch.randn(7, layer.in_features, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_A, layer.lora_B, *layer.scales.pair])
    wide = [part.double().requires_grad_() for part in pairs]
    codes = torch.from_numpy(matrix.codes.reshape(OUT, -1, grid.group_size)).double()
    change, turn = (layer.scaling * (b @ a).repeat_interleave(pool, 1) for a, b in (wide[:2], wide[2:]))
    turned = turn / layer.scales.spread.double()
    moved = turned[..., None] * codes + (change - layer.scales.centre.double() * turned)[..., None]
    weight = layer.dequantized(torch.float64) + (moved - moved.detach()).flatten(1)
    other_x = x.detach().clone().requires_grad_()
    expected = torch.autograd.grad((other_x @ weight.T).square().sum(), [other_x, *wide])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@every_grid
def test_it_compiles_into_one_graph(grid: SuperBlockGrid) -> None:
    layer = trained(matrix_on(grid))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = compiled(x), layer(x)
    assert torch.equal(found, expected)
    gradients = [
        torch.autograd.grad(y.square().sum(), (layer.lora_A, layer.lora_B), retain_graph=True)
        for y in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
