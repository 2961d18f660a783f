"""GPTQ against the published algorithm and against round to nearest."""

import numpy as np
import pytest
import torch

from qalora_export.errors import InputError
from qalora_export.quantization.gptq import damped_hessian, gptq, inverse_cholesky
from qalora_export.quantization.rtn import round_to_nearest
from qalora_export.quantization.rules import Plan
from tests.quantization.oracle import naive_gptq, weighted_error

BITS = (2, 3, 4, 5, 8)


def problem(out: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the Hessian of correlated inputs of very different power, as real activations are."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(width, width)) / np.sqrt(width) + np.eye(width)
    x = random.normal(size=(4 * width, width)) @ mix * np.exp(random.normal(size=width))
    return random.normal(size=(out, width)).astype(np.float32), 2 * x.T @ x / len(x)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_the_naive_dense_algorithm(bits: int, group: int, sym: bool) -> None:
    weight, hessian = problem(9, 256, seed=bits + group)
    result = gptq(
        torch.from_numpy(weight),
        torch.from_numpy(hessian),
        Plan(bits, group, sym),
        where="w",
        search=False,
        block_size=64,
    )
    codes, scale, offset = naive_gptq(weight, hessian, bits, group, sym=sym, damp=0.01)
    assert np.array_equal(result.codes, codes)
    assert np.array_equal(result.scale.astype(np.float64), scale)
    assert np.array_equal(result.offset.astype(np.float64), offset)
    assert not sym or result.is_symmetric


@pytest.mark.parametrize("block", [1, 48, 100, 256, 4096])
def test_blocks_change_nothing(block: int) -> None:
    weight, hessian = problem(16, 256)
    runs = [
        gptq(torch.from_numpy(weight), torch.from_numpy(hessian), Plan(3, 32, False), where="w", block_size=size)
        for size in (128, block)
    ]
    assert np.array_equal(runs[0].codes, runs[1].codes)
    assert np.array_equal(runs[0].offset, runs[1].offset)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_less_output_error_than_round_to_nearest(bits: int, sym: bool) -> None:
    weight, hessian = problem(64, 256, seed=bits)
    plan = Plan(bits, 32, sym)
    ours = gptq(torch.from_numpy(weight), torch.from_numpy(hessian), plan, where="w")
    nearest = round_to_nearest(torch.from_numpy(weight), plan, where="w")
    errors = [weighted_error(weight, matrix.dequantize(), hessian) for matrix in (ours, nearest)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("bits", BITS)
def test_the_grid_search_pays(bits: int) -> None:
    """At 2 bits plain min/max grids make GPTQ worse than rounding to nearest: the errors it hands on pile up."""
    weight, hessian = problem(64, 256, seed=5)
    plain, searched = (
        gptq(torch.from_numpy(weight), torch.from_numpy(hessian), Plan(bits, 32, False), where="w", search=search)
        for search in (False, True)
    )
    errors = [weighted_error(weight, matrix.dequantize(), hessian) for matrix in (searched, plain)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_sweeps_lower_the_output_error(bits: int, sym: bool) -> None:
    weight, hessian = problem(64, 256, seed=bits)
    errors = []
    for sweeps in (0, 2):
        result = gptq(
            torch.from_numpy(weight), torch.from_numpy(hessian), Plan(bits, 32, sym), where="w", sweeps=sweeps
        )
        errors.append(weighted_error(weight, result.dequantize(), hessian))
        assert not sym or result.is_symmetric
    assert errors[1] < 0.8 * errors[0]


def test_an_input_that_is_always_zero_is_rounded_to_nearest() -> None:
    weight, hessian = problem(8, 64)
    dead = [3, 40]
    hessian[dead] = hessian[:, dead] = 0
    result = gptq(torch.from_numpy(weight), torch.from_numpy(hessian), Plan(8, 32, False), where="w", search=False)
    step = np.repeat(result.scale, 32, axis=1).astype(np.float64)[:, dead]
    error = np.abs(result.dequantize().astype(np.float64) - weight)[:, dead]
    assert (error <= 0.51 * step).all()


def test_the_factor_is_the_upper_cholesky_of_the_inverse() -> None:
    _, hessian = problem(1, 64)
    factor = inverse_cholesky(damped_hessian(torch.from_numpy(hessian), 0.01), where="w").numpy()
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(64)
    assert np.allclose(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(damped), rtol=1e-9, atol=1e-12)


def test_no_calibration_signal_means_round_to_nearest() -> None:
    weight, _ = problem(8, 64)
    plan = Plan(4, 32, False)
    result = gptq(torch.from_numpy(weight), torch.zeros(64, 64), plan, where="w", search=False)
    assert np.array_equal(result.codes, round_to_nearest(torch.from_numpy(weight), plan, where="w").codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_hessian_is_refused_by_name(bad: float) -> None:
    weight, hessian = problem(8, 64)
    hessian[0, 0] = bad
    with pytest.raises(InputError, match=r"Hessian.*layer\.7"):
        gptq(torch.from_numpy(weight), torch.from_numpy(hessian), Plan(4, 32, False), where="layer.7")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e8])
def test_bad_weights_are_refused_by_name(bad: float) -> None:
    weight, hessian = problem(8, 64)
    weight[1, 2] = bad
    with pytest.raises(InputError, match=r"layer\.7"):
        gptq(torch.from_numpy(weight), torch.from_numpy(hessian), Plan(4, 32, False), where="layer.7")
