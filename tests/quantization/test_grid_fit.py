"""Properties of the grid over bits, group size and extreme values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qalora_export.errors import InputError
from qalora_export.grid import GroupAffine, difference
from qalora_export.quantization import rtn
from qalora_export.quantization.grid_fit import ROUND, fit_min_max, fit_weighted
from qalora_export.quantization.rtn import round_to_nearest
from qalora_export.quantization.rules import Plan

LARGEST = 65504.0
EXTREMES = st.sampled_from([0.0, -0.0, 6e-8, -6e-8, 3e-5, -1e-7, LARGEST / 4, -LARGEST / 4, 1.0, -1.0])
VALUES = EXTREMES | st.floats(-8, 8, width=16) | st.floats(-(2.0**-17), 2.0**-17, width=32)
BITS = st.sampled_from([2, 3, 4, 8])
GROUPS = st.sampled_from([32, 64, 128])


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, Plan]:
    group = draw(GROUPS)
    weight = draw(arrays(np.float32, (draw(st.integers(1, 3)), group * draw(st.integers(1, 2))), elements=VALUES))
    return weight, Plan(draw(BITS), group, draw(st.booleans()))


def rounded(weight: np.ndarray, plan: Plan) -> GroupAffine:
    return round_to_nearest(torch.from_numpy(weight), plan, where="w")


@settings(max_examples=150, deadline=None)
@given(matrices())
def test_every_code_is_the_nearest_one_on_the_rounded_grid(case: tuple[np.ndarray, Plan]) -> None:
    weight, plan = case
    matrix = rounded(weight, plan)
    shape = (*matrix.scale.shape, plan.group_size)
    scale, offset = (part.astype(np.float64)[..., None, None] for part in (matrix.scale, matrix.offset))
    every = scale * np.arange(2**plan.bits) + offset  # (out, in/g, 1, 2^b)
    best = np.abs(every - weight.astype(np.float64).reshape(shape)[..., None]).min(-1)
    chosen = np.take_along_axis(
        np.broadcast_to(every, (*shape, 2**plan.bits)), matrix.codes.reshape(shape)[..., None].astype(np.int64), -1
    )[..., 0]
    np.testing.assert_allclose(np.abs(chosen - weight.reshape(shape)), best, rtol=1e-12, atol=1e-13 * LARGEST)


@settings(max_examples=150, deadline=None)
@given(matrices())
def test_the_grid_reaches_every_weight(case: tuple[np.ndarray, Plan]) -> None:
    """Error at most half a step plus what fp16 takes from scale (times the highest code) and offset."""
    weight, plan = case
    matrix = rounded(weight, plan)
    step = np.repeat(matrix.scale, plan.group_size, axis=1).astype(np.float64)
    corner = np.repeat(np.abs(matrix.offset), plan.group_size, axis=1).astype(np.float64)
    highest = 2**plan.bits - 1
    slack = (corner + highest * step) * 2.0**-11 + highest * 2.0**-24 + 2.0**-24
    assert (np.abs(matrix.dequantize().astype(np.float64) - weight) <= step / 2 + slack).all()
    assert not plan.sym or matrix.is_symmetric


@settings(max_examples=100, deadline=None)
@given(matrices(), st.integers(0, 3))
def test_the_search_is_never_worse_than_min_max(case: tuple[np.ndarray, Plan], seed: int) -> None:
    weight, plan = case
    groups = torch.from_numpy(weight).double().unflatten(1, (-1, plan.group_size))
    importance = torch.from_numpy(np.random.default_rng(seed).exponential(size=plan.group_size))
    errors = []
    for grid in (
        fit_weighted(groups, importance, plan.bits, sym=plan.sym),
        fit_min_max(groups, plan.bits, sym=plan.sym),
    ):
        for part in grid:
            assert torch.equal(part, part.half().double()), "fp16 numbers only"
        if plan.sym:
            assert torch.equal(grid.offset, -(2.0 ** (plan.bits - 1)) * grid.scale)
        assert (grid.scale >= 0).all()
        errors.append((grid.values(grid.codes(groups, plan.bits)) - groups).square() @ importance)
    assert (errors[0] <= errors[1]).all()


@given(st.floats(-60000, 60000), BITS)
def test_a_constant_group_is_its_fp16_value(value: float, bits: int) -> None:
    weight = np.full((2, 64), value, np.float32)
    matrix = rounded(weight, Plan(bits, 32, False))
    assert np.array_equal(matrix.dequantize(), weight.astype(np.float16).astype(np.float32))
    assert not matrix.codes.any()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_group_is_plus_zero_in_every_byte(bits: int, sym: bool) -> None:
    matrix = rounded(np.array([[0.0, -0.0] * 16], np.float32), Plan(bits, 32, sym))
    assert not matrix.scale.view(np.uint16).any()
    assert not matrix.offset.view(np.uint16).any()
    assert not matrix.codes.any()


@pytest.mark.parametrize(("weight", "sym"), [(1e8, False), (-7e4, False), (LARGEST, True), (3e38, False)])
def test_weights_too_large_for_fp16_are_refused_by_name(weight: float, sym: bool) -> None:
    matrix = np.zeros((2, 32), np.float32)
    matrix[1, 5] = weight
    if sym:
        matrix[1, 6] = -LARGEST * 4
    with pytest.raises(InputError, match=r"too large for fp16.*model\.layers\.3"):
        round_to_nearest(torch.from_numpy(matrix), Plan(8, 32, sym), where="model.layers.3")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    matrix = np.zeros((2, 32), np.float32)
    matrix[0, 31] = bad
    with pytest.raises(InputError, match=r"NaN or infinite.*model\.layers\.3"):
        round_to_nearest(torch.from_numpy(matrix), Plan(4, 32, False), where="model.layers.3")


@given(arrays(np.float64, 64, elements=st.floats(0, 255) | st.integers(0, 254).map(lambda n: n + 0.5)))
def test_rounding_by_a_large_constant_is_rounding_to_even(values: np.ndarray) -> None:
    assert np.array_equal((values + ROUND) - ROUND, np.rint(values))


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_the_least_squared_error_is_never_more_than_that_of_min_and_max(case: tuple[np.ndarray, Plan]) -> None:
    weight, plan = case
    tensor = torch.from_numpy(weight)
    errors = []
    for mse in (True, False):
        matrix = round_to_nearest(tensor, plan, where="w", mse=mse)
        values = matrix.codes.reshape(*matrix.scale.shape, -1) * matrix.scale.astype(float)[..., None]
        values += matrix.offset.astype(float)[..., None]
        errors.append(np.square(values - weight.reshape(values.shape)).sum(-1))
    assert (errors[0] <= errors[1] * (1 + 1e-12)).all()


def test_a_bell_of_weights_is_fitted_closer_and_in_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, plan = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), Plan(3, 64, False)
    whole = round_to_nearest(weight, plan, where="w", mse=True)
    error, other = (
        (torch.from_numpy(matrix.dequantize()) - weight).square().mean()
        for matrix in (whole, round_to_nearest(weight, plan, where="w"))
    )
    assert error < 0.9 * other
    monkeypatch.setattr(rtn, "FITTED_VALUES", 500)
    assert difference(whole, round_to_nearest(weight, plan, where="w", mse=True)).total == 0
