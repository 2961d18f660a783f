"""Packing against a bit string built one bit at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_export.errors import InputError
from qalora_export.grid import BITS, pack_codes, packed_width, unpack_codes


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.sampled_from(BITS))
    rows, columns = draw(st.integers(1, 5)), 16 * draw(st.integers(1, 6))
    values = draw(st.binary(min_size=rows * columns, max_size=rows * columns))
    codes = np.frombuffer(values, np.uint8).reshape(rows, columns) & (2**bits - 1)
    return codes.astype(np.uint8), bits


def slowly_packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bit k of a row's string is bit k % bits of code k // bits, and goes to bit k % 8 of byte k // 8."""
    packed = np.zeros((codes.shape[0], codes.shape[1] * bits // 8), np.uint8)
    for row in range(codes.shape[0]):
        for k in range(codes.shape[1] * bits):
            packed[row, k // 8] |= ((int(codes[row, k // bits]) >> (k % bits)) & 1) << (k % 8)
    return packed


@settings(max_examples=150, deadline=None)
@given(code_matrices())
def test_layout_and_round_trip(case: tuple[np.ndarray, int]) -> None:
    codes, bits = case
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (codes.shape[0], packed_width(codes.shape[1], bits))
    np.testing.assert_array_equal(packed, slowly_packed(codes, bits))
    np.testing.assert_array_equal(unpack_codes(packed, bits), codes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 6), st.randoms(use_true_random=False))
def test_every_byte_pattern_is_some_matrix(bits: int, rows: int, blocks: int, random: object) -> None:
    width = packed_width(16 * blocks, bits)
    packed = np.frombuffer(random.randbytes(rows * width), np.uint8).reshape(rows, width)
    np.testing.assert_array_equal(pack_codes(unpack_codes(packed, bits), bits), packed)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_a_code_that_does_not_fit_is_refused(bits: int) -> None:
    codes = np.zeros((2, 16), np.uint8)
    codes[1, 7] = 2**bits
    with pytest.raises(InputError, match="does not fit"):
        pack_codes(codes, bits)


def test_rows_that_end_inside_a_byte_are_refused() -> None:
    with pytest.raises(InputError, match="whole bytes"):
        packed_width(10, 3)


def test_read_only_and_strided_input() -> None:
    codes = np.arange(64, dtype=np.uint8).reshape(4, 16) % 16
    codes.flags.writeable = False
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes[::2], 4), 4), codes[::2])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(3, 80_000), (1, 16), (5, 1008)])
def test_matrices_of_several_slabs(bits: int, shape: tuple[int, int]) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape, np.uint8)
    string = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]  # (out, in, bits)
    expected = np.packbits(string.reshape(shape[0], -1), axis=-1, bitorder="little")
    np.testing.assert_array_equal(pack_codes(codes, bits), expected)
    np.testing.assert_array_equal(unpack_codes(expected, bits), codes)


def test_rows_of_four_codes_of_two_bits_fill_a_byte() -> None:
    codes = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]], np.uint8)
    assert pack_codes(codes, 2).tolist() == [[0b11100100], [0b00011011], [0b01010101]]
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, 2), 2), codes)
