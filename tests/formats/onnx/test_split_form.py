"""The numbers of the split form and MatMulNBits' byte layout."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.onnx import split_form
from qalora_export.formats.onnx.split_form import (
    CONTAINER_BITS,
    choose_form,
    from_blocks,
    offset_of,
    to_blocks,
    zero_points,
)
from qalora_export.grid import GroupAffine, differing, implied_offset, pack_codes
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
    """float32(s·(q − z)) + float32(R) rounds once, to the canonical weight; and m comes back, bit for bit."""
    form = choose_form(matrix.bits, matrix.scale, matrix.offset, where="test")
    s, z = matrix.scale.astype(np.float32), form.zero.astype(np.float32)
    remainder = np.zeros_like(s) if form.remainder is None else form.remainder.astype(np.float32)
    assert np.array_equal(remainder.astype(np.float64), matrix.offset + z.astype(np.float64) * s)
    q = matrix.codes.reshape(*s.shape, -1).astype(np.float32)
    weight = s[..., None] * (q - z[..., None]) + remainder[..., None]
    assert np.array_equal(weight.reshape(matrix.shape), matrix.dequantize())
    assert differing(offset_of(matrix.scale, form.zero, form.remainder, where="test"), matrix.offset) == 0


def slow_form(matrix: GroupAffine) -> tuple[list[list[int]], list[list[float]], int]:
    """z, R and the number of moved z, one group at a time in exact fractions."""
    zeros, rests, moved = [], [], 0
    for scales, offsets in zip(matrix.scale.tolist(), matrix.offset.tolist(), strict=True):
        row: list[tuple[int, float]] = []
        for s, m in zip(scales, offsets, strict=True):
            z = min(max(round(-Fraction(m) / Fraction(s)), 0), 2**matrix.bits - 1) if s else 2 ** (matrix.bits - 1)
            rest = Fraction(m) + z * Fraction(s)
            if Fraction(float(np.float32(float(rest)))) != rest:
                z, rest, moved = 0, Fraction(m), moved + 1
            row.append((z, m if z * s == 0 else float(rest)))
        zeros.append([z for z, _ in row])
        rests.append([rest for _, rest in row])
    return zeros, rests, moved


@settings(max_examples=100, deadline=None)
@given(matrices())
def test_the_fast_form_is_that_of_exact_fractions(matrix: GroupAffine) -> None:
    zeros, rests, moved = slow_form(matrix)
    form = choose_form(matrix.bits, matrix.scale, matrix.offset, where="test")
    assert (form.zero.tolist(), form.moved) == (zeros, moved)
    expected = np.array(rests)
    if form.remainder is None:
        assert not expected.any()
    else:
        assert differing(form.remainder.astype(np.float64), expected) == 0
        held = np.array_equal(expected.astype(np.float16).astype(np.float64), expected)
        assert form.remainder.dtype == (np.float16 if held else np.float32)


@settings(max_examples=50, deadline=None)
@given(matrices())
def test_slabs_of_rows_give_the_same_form(matrix: GroupAffine) -> None:
    whole = choose_form(matrix.bits, matrix.scale, matrix.offset, where="test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_form, "SLAB_BYTES", 1)
        rows = choose_form(matrix.bits, matrix.scale, matrix.offset, where="test")
    assert (rows.moved, differing(rows.zero, whole.zero)) == (whole.moved, 0)
    assert (rows.remainder is None) == (whole.remainder is None)
    assert rows.remainder is None or whole.remainder is None or differing(rows.remainder, whole.remainder) == 0


@given(matrices())
def test_z_is_the_code_of_the_smallest_weight(matrix: GroupAffine) -> None:
    """Slow and obvious: no code of a group stands for a weight nearer to 0, unless z had to move for exactness."""
    form = choose_form(matrix.bits, matrix.scale, matrix.offset, where="test")
    codes = np.arange(2**matrix.bits, dtype=np.float64)
    weights = np.abs(matrix.scale.astype(np.float64)[..., None] * codes + matrix.offset.astype(np.float64)[..., None])
    chosen = np.take_along_axis(weights, form.zero[..., None].astype(np.int64), axis=-1)[..., 0]
    assert np.count_nonzero(chosen > weights.min(axis=-1)) <= form.moved


@settings(max_examples=200)
@given(matrices(ordinary=True))
def test_float16_holds_what_is_left_wherever_a_code_lies_beside_weight_0(matrix: GroupAffine) -> None:
    form = choose_form(matrix.bits, matrix.scale, matrix.offset, where="test")
    assert form.remainder is not None
    rest = form.remainder.astype(np.float64)
    unclipped = np.abs(rest) <= matrix.scale.astype(np.float64) / 2
    assert np.array_equal(rest[unclipped].astype(np.float16), rest[unclipped])
    assert form.moved == 0


def test_a_remainder_that_float32_would_round_moves_its_zero_only() -> None:
    scale, offset = np.full((1, 2), 2.0**-24, np.float16), np.array([[-60000.0, -(2.0**-22)]], np.float16)
    form = choose_form(4, scale, offset, where="test")
    assert (form.zero.tolist(), form.moved) == ([[0, 4]], 1)
    assert form.remainder is not None and form.remainder.tolist() == [[-60000.0, 0.0]]


@pytest.mark.parametrize(("bits", "zero", "explicit"), [(2, 2, False), (3, 4, True), (4, 8, False), (8, 128, False)])
def test_symmetric_tensors_have_no_remainder(bits: int, zero: int, explicit: bool) -> None:
    scale = np.array([[0.01, 0.5]], np.float16)
    form = choose_form(bits, scale, implied_offset(scale, zero), where="test")
    assert (form.zero.tolist(), form.explicit_zero, form.remainder) == ([[zero] * 2], explicit, None)


def test_an_offset_that_an_integer_zero_only_rounds_to_keeps_its_remainder() -> None:
    scale = np.array([[1 + 2.0**-10]], np.float16)
    form = choose_form(4, scale, implied_offset(scale, 7), where="test")  # 7·(1 + 2^−10) is no float16
    assert form.remainder is not None and form.remainder.any()


def test_zero_points_fill_whole_bytes_lowest_bits_first() -> None:
    scale, offset = np.full((2, 5), 1, np.float16), np.array([[-1, -2, -3, -4, -5]] * 2, np.float16)
    assert zero_points(choose_form(3, scale, offset, where="test")).tolist() == [[0x21, 0x43, 0x05]] * 2


def test_a_remainder_of_no_float16_offset_is_unsafe() -> None:
    scale, zero = np.array([[1.0]], np.float16), np.array([[3]], np.uint8)
    with pytest.raises(UnsafeInputError, match="remainder"):
        offset_of(scale, zero, np.array([[2.0**-20]], np.float32), where="test")


def test_non_finite_offset_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="NaN") as error:
        choose_form(4, np.ones((1, 1), np.float16), np.full((1, 1), np.nan, np.float16), where="layer.q_proj")
    assert error.value.where == "layer.q_proj"
