"""The numbers of the split form and MatMulNBits' byte layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from qalora_export.errors import InputError
from qalora_export.formats.onnx.split_form import (
    CONTAINER_BITS,
    choose_form,
    from_blocks,
    remainder_is_exact,
    to_blocks,
    zero_points,
)
from qalora_export.grid import GroupAffine, pack_codes
from tests.formats.onnx.helpers import matrices


@given(matrices())
def test_blocks_hold_every_code_and_return_it(matrix: GroupAffine) -> None:
    blocks = to_blocks(pack_codes(matrix.codes, matrix.bits), matrix.bits, matrix.scale.shape[1])
    container = CONTAINER_BITS[matrix.bits]
    assert blocks.shape == (*matrix.scale.shape, matrix.group_size * container // 8)
    assert np.array_equal(from_blocks(blocks, container), matrix.codes)


@given(matrices())
def test_blocks_are_what_the_operator_description_says(matrix: GroupAffine) -> None:
    """Slow and obvious: element i of a block at bits [i·b, (i+1)·b) of the block, least significant bit first."""
    container = CONTAINER_BITS[matrix.bits]
    blocks = to_blocks(pack_codes(matrix.codes, matrix.bits), matrix.bits, matrix.scale.shape[1])
    row = matrix.codes[0].reshape(-1, matrix.group_size)
    for group, codes in enumerate(row):
        value = sum(int(code) << (container * at) for at, code in enumerate(codes))
        assert bytes(blocks[0, group]) == value.to_bytes(matrix.group_size * container // 8, "little")


@given(matrices())
def test_split_form_is_exact_with_one_rounding(matrix: GroupAffine) -> None:
    """float32(s·(q − z)) + float32(R) rounds once, to the canonical weight."""
    form = choose_form(matrix.bits, matrix.scale, matrix.offset, where="test")
    s, m = matrix.scale.astype(np.float32), matrix.offset.astype(np.float32)
    remainder = m + np.float32(form.zero) * s if form.has_remainder else np.zeros_like(m)
    exact = m.astype(np.float64) + form.zero * s.astype(np.float64)
    assert np.array_equal(remainder.astype(np.float64), exact)
    q = matrix.codes.reshape(*s.shape, -1).astype(np.float32)
    weight = s[..., None] * (q - np.float32(form.zero)) + remainder[..., None]
    assert np.array_equal(weight.reshape(matrix.shape), matrix.dequantize())


def test_middle_zero_is_kept_unless_the_offset_would_be_rounded() -> None:
    scale, offset = np.full((1, 1), 2.0**-24, np.float16), np.full((1, 1), 60000.0, np.float16)
    assert not remainder_is_exact(scale, offset, 8)
    form = choose_form(4, scale, offset, where="test")
    assert (form.zero, form.explicit_zero, form.has_remainder) == (0, True, True)
    ordinary = choose_form(4, np.full((1, 1), 0.01, np.float16), np.full((1, 1), -0.07, np.float16), where="test")
    assert (ordinary.zero, ordinary.explicit_zero, ordinary.has_remainder) == (8, False, True)


@pytest.mark.parametrize(("bits", "zero", "explicit"), [(2, 2, False), (3, 4, True), (4, 8, False), (8, 128, False)])
def test_symmetric_tensors_have_no_remainder(bits: int, zero: int, explicit: bool) -> None:
    scale = np.array([[0.01, 0.5]], np.float16)
    offset = (-np.float32(zero) * scale.astype(np.float32)).astype(np.float16)
    form = choose_form(bits, scale, offset, where="test")
    assert (form.zero, form.explicit_zero, form.has_remainder) == (zero, explicit, False)


def test_zero_points_fill_whole_bytes() -> None:
    form = choose_form(3, np.full((2, 5), 0.01, np.float16), np.full((2, 5), 0.5, np.float16), where="test")
    assert zero_points(form, 2, 5).tolist() == [[0x44] * 3] * 2


@settings(max_examples=20)
@given(matrices(ordinary=True))
def test_real_looking_tensors_keep_the_middle_zero(matrix: GroupAffine) -> None:
    form = choose_form(matrix.bits, matrix.scale, matrix.offset, where="test")
    assert form.zero == 2 ** (matrix.bits - 1)


def test_non_finite_offset_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="NaN") as error:
        choose_form(4, np.ones((1, 1), np.float16), np.full((1, 1), np.nan, np.float16), where="layer.q_proj")
    assert error.value.where == "layer.q_proj"
