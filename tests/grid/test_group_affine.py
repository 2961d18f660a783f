"""What GroupAffine accepts, and its dequantization against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_export.errors import InputError
from qalora_export.grid import BITS, GROUP_SIZES, GroupAffine

HALF = np.float16


def valid(**changes: object) -> dict[str, object]:
    fields = {
        "codes": np.ones((3, 64), np.uint8),
        "scale": np.ones((3, 2), HALF),
        "offset": np.zeros((3, 2), HALF),
        "bits": 4,
    }
    return fields | changes


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed[1, 1] = value
    return changed


REFUSED = {
    "bits 7": ({"bits": 7}, "bits"),
    "codes of 16 bits": ({"codes": np.ones((3, 64), np.uint16)}, "dtypes"),
    "scale in float32": ({"scale": np.ones((3, 2), np.float32)}, "dtypes"),
    "offset in float64": ({"offset": np.ones((3, 2))}, "dtypes"),
    "codes with one axis": ({"codes": np.ones(64, np.uint8)}, "belong together"),
    "scale and offset disagree": ({"offset": np.zeros((3, 1), HALF)}, "belong together"),
    "rows disagree": ({"codes": np.ones((4, 64), np.uint8)}, "belong together"),
    "no rows": (
        {"codes": np.ones((0, 64), np.uint8), "scale": np.ones((0, 2), HALF), "offset": np.ones((0, 2), HALF)},
        "divide",
    ),
    "no groups": ({"scale": np.ones((3, 0), HALF), "offset": np.ones((3, 0), HALF)}, "divide"),
    "uneven groups": ({"codes": np.ones((3, 65), np.uint8)}, "divide"),
    "group size 8": ({"codes": np.ones((3, 16), np.uint8)}, "group size"),
    "group size 256": ({"codes": np.ones((3, 512), np.uint8)}, "group size"),
    "code 16 in 4 bits": ({"codes": with_value(np.ones((3, 64), np.uint8), 16)}, "does not fit"),
    "scale NaN": ({"scale": with_value(np.ones((3, 2), HALF), np.nan)}, "NaN"),
    "offset infinite": ({"offset": with_value(np.ones((3, 2), HALF), -np.inf)}, "NaN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    changes, reason = REFUSED[case]
    with pytest.raises(InputError, match=reason):
        GroupAffine(**valid(**changes))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_accepts_every_bit_width_and_group_size(bits: int, group: int) -> None:
    codes = np.full((2, 3 * group), 2**bits - 1, np.uint8)
    matrix = GroupAffine(codes, np.ones((2, 3), HALF), np.zeros((2, 3), HALF), bits)
    assert (matrix.group_size, matrix.shape) == (group, (2, 3 * group))


finite_half = st.integers(0, 2**16 - 1).filter(lambda bits: bits & 0x7C00 != 0x7C00)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BITS), finite_half, finite_half, st.integers(0, 255))
def test_dequantizes_with_one_rounding(bits: int, scale_bits: int, offset_bits: int, code: int) -> None:
    """Subnormal, zero, negative, largest: the float32 nearest to the exact rational number."""
    code %= 2**bits
    scale, offset = (np.array([[b]], np.uint16).view(HALF) for b in (scale_bits, offset_bits))
    matrix = GroupAffine(np.full((1, 16), code, np.uint8), scale, offset, bits)
    exact = Fraction(float(scale[0, 0])) * code + Fraction(float(offset[0, 0]))
    found = matrix.dequantize()[0, 0]
    assert found.dtype == np.float32
    assert found == np.float32(float(exact))  # at most 44 significant bits: float64 is exact on the way


def test_s_times_q_is_exact_in_float32() -> None:
    """Why one rounding suffices, for every float16 scale and the largest code of every width."""
    every = np.arange(2**16, dtype=np.uint16).view(HALF)
    every = every[np.isfinite(every)]
    for q in (3, 7, 15, 255, 171):
        np.testing.assert_array_equal(
            every.astype(np.float32) * np.float32(q), (every.astype(np.float64) * q).astype(np.float32)
        )
        np.testing.assert_array_equal(every.astype(np.float32) * np.float32(q), every.astype(np.float64) * q)


@pytest.mark.parametrize(("bits", "middle"), [(2, 2), (3, 4), (4, 8), (8, 128)])
def test_symmetric_means_offset_is_minus_middle_times_scale(bits: int, middle: int) -> None:
    scale = np.array([[0.5, 0.0], [-1.25, 2**-14]], HALF)
    offset = (-middle * scale.astype(np.float32)).astype(HALF)
    codes = np.zeros((2, 64), np.uint8)
    assert GroupAffine(codes, scale, offset, bits).is_symmetric
    assert GroupAffine(codes, scale, np.abs(offset) * np.sign(offset), bits).is_symmetric  # +0 for -0
    offset[0, 0] = np.nextafter(offset[0, 0], HALF(0))
    assert not GroupAffine(codes, scale, offset, bits).is_symmetric


def test_is_frozen() -> None:
    matrix = GroupAffine(**valid())
    with pytest.raises(AttributeError):
        matrix.bits = 8
