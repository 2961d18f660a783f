"""torch and numpy dequantize to the same bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_export.grid import GroupAffine, differing, pack_codes
from qalora_export.qalora.dequant import dequantize, unpack_codes

finite_half = st.integers(0, 2**16 - 1).filter(lambda bits: bits & 0x7C00 != 0x7C00)  # every finite float16, ±0 too


@st.composite
def matrices(draw: st.DrawFn) -> GroupAffine:
    bits, group = draw(st.sampled_from((2, 3, 4, 5, 6, 8))), draw(st.sampled_from((16, 32, 64, 128)))
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    halves = st.lists(finite_half, min_size=rows * groups, max_size=rows * groups)
    scale, offset = (
        np.array(draw(halves), np.uint16).view(np.float16).reshape(rows, groups) for _ in ("scale", "offset")
    )
    return GroupAffine(rng.integers(0, 2**bits, (rows, groups * group)).astype(np.uint8), scale, offset, bits)


def as_torch(matrix: GroupAffine) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.from_numpy(pack_codes(matrix.codes, matrix.bits)),
        torch.from_numpy(matrix.scale),
        torch.from_numpy(matrix.offset),
    )


@settings(max_examples=150, deadline=None)
@given(matrices())
def test_equals_the_canonical_form_bit_for_bit(matrix: GroupAffine) -> None:
    packed, scale, offset = as_torch(matrix)
    assert differing(unpack_codes(packed, matrix.bits).numpy(), matrix.codes) == 0
    assert differing(dequantize(packed, scale, offset, matrix.bits, torch.float32).numpy(), matrix.dequantize()) == 0
    assert (
        differing(dequantize(packed, scale, offset.float(), matrix.bits, torch.float32).numpy(), matrix.dequantize())
        == 0
    )


@settings(max_examples=100, deadline=None)
@given(matrices())
def test_is_one_rounding_of_the_exact_value(matrix: GroupAffine) -> None:
    """float64 holds s·q + m of float16 numbers exactly here, so rounding it once is the definition."""
    exact = np.empty(matrix.shape, np.longdouble)
    group = matrix.group_size
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            s, m = matrix.scale[row, column // group], matrix.offset[row, column // group]
            exact[row, column] = np.longdouble(s) * int(matrix.codes[row, column]) + np.longdouble(m)
    packed, scale, offset = as_torch(matrix)
    found = dequantize(packed, scale, offset, matrix.bits, torch.float32).numpy()
    np.testing.assert_array_equal(found, exact.astype(np.float32))  # as numbers: -0 equals 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_round_the_float32_value_once(dtype: torch.dtype) -> None:
    from tests.qalora.layers import random_matrix

    matrix = random_matrix(16, 128)
    packed, scale, offset = as_torch(matrix)
    expected = torch.from_numpy(matrix.dequantize()).to(dtype)
    assert torch.equal(dequantize(packed, scale, offset, 4, dtype), expected)


def test_float64_holds_the_float32_numbers() -> None:
    from tests.qalora.layers import random_matrix

    matrix = random_matrix(16, 128, bits=3)
    found = dequantize(*as_torch(matrix), 3, torch.float64)
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.from_numpy(matrix.dequantize()).double())
