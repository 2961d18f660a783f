"""canonical ↔ GGUF blocks: nothing differs, judged by the gguf package's dequantizer and by a slow loop, too."""

import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.gguf.blocks import BLOCK_FORMATS, exact_format, remainder
from qalora_export.grid import GroupAffine, difference, differing
from tests.formats.gguf.strategies import finite_fp16, matrices


def slow_q4_1(matrix: GroupAffine) -> bytes:
    """block_q4_1 as ggml-common.h declares it, one byte at a time."""
    result = b""
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], 32):
            group = start // matrix.group_size
            result += struct.pack("<ee", matrix.scale[row, group], matrix.offset[row, group])
            codes = [int(code) for code in matrix.codes[row, start : start + 32]]
            result += bytes(codes[j] | codes[j + 16] << 4 for j in range(16))
    return result


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_block_sizes_are_those_of_the_gguf_package(name: str) -> None:
    assert GGML_QUANT_SIZES[GGMLQuantizationType[name]] == (32, BLOCK_FORMATS[name].block_bytes)


@settings(max_examples=150, deadline=None)
@given(matrices())
def test_q4_1_round_trip_and_value(matrix: GroupAffine) -> None:
    fmt = BLOCK_FORMATS["Q4_1"]
    rows = fmt.encode(matrix)
    assert rows.tobytes() == slow_q4_1(matrix)
    back = fmt.decode(rows, bits=matrix.bits, group_size=matrix.group_size)
    assert difference(matrix, back).total == 0
    assert (back.bits, back.group_size) == (matrix.bits, matrix.group_size)
    assert differing(dequantize(rows, GGMLQuantizationType.Q4_1), matrix.dequantize()) == 0  # bit for bit


@settings(max_examples=80, deadline=None)
@given(matrices(bits=(4,), sym=True))
def test_symmetric_four_bits_are_exactly_q4_0(matrix: GroupAffine) -> None:
    fmt = BLOCK_FORMATS["Q4_0"]
    rows = fmt.encode(matrix)
    assert difference(matrix, fmt.decode(rows, bits=4, group_size=matrix.group_size)).total == 0
    np.testing.assert_array_equal(dequantize(rows, GGMLQuantizationType.Q4_0), matrix.dequantize())


@settings(max_examples=80, deadline=None)
@given(matrices(bits=(8,), sym=True))
def test_symmetric_eight_bits_are_exactly_q8_0(matrix: GroupAffine) -> None:
    assert exact_format(matrix, where="w").name == "Q8_0"
    fmt = BLOCK_FORMATS["Q8_0"]
    rows = fmt.encode(matrix)
    assert difference(matrix, fmt.decode(rows, bits=8, group_size=matrix.group_size)).total == 0
    np.testing.assert_array_equal(dequantize(rows, GGMLQuantizationType.Q8_0), matrix.dequantize())


@settings(max_examples=80, deadline=None)
@given(matrices(bits=(2, 3, 4)))
def test_q4_0_and_remainder_are_the_matrix_whenever_the_remainder_is_exact(matrix: GroupAffine) -> None:
    """s·(q − 8) + R in float32 equals s·q + m bit for bit, or remainder() refuses."""
    try:
        rest = remainder(matrix, 8, where="w")
    except InputError:
        exact = matrix.offset.astype(np.float64) + 8 * matrix.scale.astype(np.float64)
        assert (exact.astype(np.float32) != exact).any()
        return
    base = dequantize(BLOCK_FORMATS["Q4_0"].encode(matrix), GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(base + np.repeat(rest, matrix.group_size, axis=1), matrix.dequantize())


@settings(max_examples=50, deadline=None)
@given(finite_fp16((2, 2)), st.sampled_from((2, 3, 4)))
def test_a_realistic_remainder_is_exact(scale: np.ndarray, bits: int) -> None:
    """Offsets within the range of the codes, as every quantizer makes them, leave an exact remainder."""
    offset = (-(2 ** (bits - 1)) * np.clip(scale, -4000, 4000).astype(np.float32)).astype(np.float16)
    matrix = GroupAffine(np.zeros((2, 64), np.uint8), np.clip(scale, -4000, 4000), offset, bits)
    assert remainder(matrix, 8, where="w").dtype == np.float32


def matrix(bits: int, group: int) -> GroupAffine:
    codes = np.zeros((2, 2 * group), np.uint8)
    return GroupAffine(codes, np.ones((2, 2), np.float16), np.full((2, 2), 3, np.float16), bits)


def test_what_gguf_cannot_hold_is_refused_with_the_formats_that_can() -> None:
    with pytest.raises(InputError, match="ONNX"):
        exact_format(matrix(8, 32), where="lm_head")
    with pytest.raises(InputError, match=r"group size 16.*ONNX"):
        exact_format(matrix(4, 16), where="lm_head")
    with pytest.raises(InputError, match="8-bit"):
        BLOCK_FORMATS["Q4_1"].encode(matrix(8, 32))
    with pytest.raises(InputError, match="4 bits"):
        BLOCK_FORMATS["Q8_0"].encode(matrix(4, 32))


def test_blocks_that_contradict_the_declaration_are_unsafe() -> None:
    narrow = matrix(4, 32)
    narrow.scale[:, 1] = 2
    rows = BLOCK_FORMATS["Q4_1"].encode(narrow)
    with pytest.raises(UnsafeInputError, match="disagree"):
        BLOCK_FORMATS["Q4_1"].decode(rows, bits=4, group_size=64)
    with pytest.raises(UnsafeInputError, match="divide"):
        BLOCK_FORMATS["Q4_1"].decode(rows, bits=4, group_size=128)
    narrow.codes[0, 0] = 9
    with pytest.raises(UnsafeInputError, match="2 bits"):
        BLOCK_FORMATS["Q4_1"].decode(BLOCK_FORMATS["Q4_1"].encode(narrow), bits=2, group_size=32)


def test_an_offset_beyond_fp16_is_refused() -> None:
    wide = GroupAffine(np.zeros((1, 32), np.uint8), np.full((1, 1), 60000, np.float16), np.zeros((1, 1), np.float16), 4)
    with pytest.raises(InputError, match="overflows"):
        BLOCK_FORMATS["Q4_0"].decode(BLOCK_FORMATS["Q4_0"].encode(wide))
