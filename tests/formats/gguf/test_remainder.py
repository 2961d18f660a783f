"""Remainders of layout "split": exact or refused, both ways, against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.gguf.remainder import group_indicator, remainder, with_remainder
from qalora_export.grid import PackedAffine, differing

NUMBERS = st.floats(-65504, 65504, width=16)
ZERO = 8


def matrix(scale: float, offset: float) -> PackedAffine:
    codes = np.zeros((1, 16), np.uint8)
    return PackedAffine(codes, np.full((1, 1), scale, np.float16), np.full((1, 1), offset, np.float16), 4, 32)


@settings(deadline=None)
@given(NUMBERS, NUMBERS)
def test_a_remainder_is_the_exact_sum_or_refused_and_gives_the_offset_back(scale: float, offset: float) -> None:
    given_one = matrix(scale, offset)
    exact = Fraction(offset) + ZERO * Fraction(scale)
    if Fraction(float(np.float32(float(exact)))) != exact:
        with pytest.raises(InputError, match="not exact in float32"):
            remainder(given_one.scale, given_one.offset, ZERO, where="w")
        return
    rest = remainder(given_one.scale, given_one.offset, ZERO, where="w")
    assert (rest.dtype, rest.item()) == (np.float32, float(exact))
    back = with_remainder(matrix(scale, 0), rest, ZERO, where="w")
    assert differing(back.offset + np.float16(0), given_one.offset + np.float16(0)) == 0  # −0 and +0 are one here


@pytest.mark.parametrize(
    "rest, why",
    [(2.0**-30, "does not come from"), (1 + 2.0**-20, "does not come from"), (1e6, "not hold"), (np.nan, "not hold")],
    ids=["sum is rounded", "no float16", "too large", "NaN"],
)
def test_a_remainder_of_no_float16_offset_is_refused(rest: float, why: str) -> None:
    with pytest.raises(UnsafeInputError, match=why):
        with_remainder(matrix(1, 0), np.full((1, 1), rest, np.float32), ZERO, where="file")


def test_a_remainder_of_another_shape_is_refused() -> None:
    with pytest.raises(UnsafeInputError, match="of this matrix"):
        with_remainder(matrix(1, 0), np.zeros((2, 1), np.float32), ZERO, where="file")


def test_rows_of_the_indicator_sum_their_group() -> None:
    whole = group_indicator(3, 32)
    assert np.array_equal(whole, np.kron(np.eye(3), np.ones(32)))
    assert np.array_equal(group_indicator(3, 32, slice(1, 3)), whole[1:])
