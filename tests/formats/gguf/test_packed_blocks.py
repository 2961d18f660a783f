"""The packed path against blocks.py, its slow oracle: byte for byte, both ways."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.gguf.blocks import BLOCK_FORMATS
from qalora_export.formats.gguf.nibbles import from_block_order, to_block_order
from qalora_export.formats.gguf.packed_blocks import decode, encode
from qalora_export.grid import GroupAffine, PackedAffine, difference, unpack_codes
from tests.formats.gguf.strategies import matrices


@given(matrix=matrices(), kind=st.sampled_from(["Q4_1", "Q4_0"]))
def test_rows_equal_those_of_the_oracle(matrix: GroupAffine, kind: str) -> None:
    assert encode(kind, PackedAffine.pack(matrix)).tobytes() == BLOCK_FORMATS[kind].encode(matrix).tobytes()


@given(matrix=matrices())
def test_q4_1_round_trip(matrix: GroupAffine) -> None:
    rows = encode("Q4_1", PackedAffine.pack(matrix))
    found = decode("Q4_1", rows, bits=matrix.bits, group_size=matrix.group_size)
    assert difference(found.unpack(), matrix).total == 0


@pytest.mark.parametrize("kind, widths", [("Q4_0", (2, 3, 4)), ("Q8_0", (8,))])
@given(data=st.data())
def test_symmetric_round_trip_and_oracle(kind: str, widths: tuple[int, ...], data: st.DataObject) -> None:
    matrix = data.draw(matrices(widths, sym=True))
    if matrix.bits in (2, 3):  # their own zero is 2 or 4, Q4_0's is 8: scale and codes must still come back
        matrix = GroupAffine(matrix.codes, np.clip(matrix.scale, -8000, 8000), matrix.offset, matrix.bits)
    rows = encode(kind, PackedAffine.pack(matrix))
    found = decode(kind, rows, bits=matrix.bits, group_size=matrix.group_size).unpack()
    oracle = BLOCK_FORMATS[kind].decode(rows, bits=matrix.bits, group_size=matrix.group_size)
    assert difference(found, oracle).total == 0
    assert difference(found, matrix).codes == difference(found, matrix).scale == 0


def test_every_nibble_goes_to_its_place() -> None:
    """One code set at a time, against the definition: byte j = element j | element j + 16 << 4."""
    for element in range(64):
        codes = np.zeros((1, 64), np.uint8)
        codes[0, element] = 15
        packed = PackedAffine.pack(GroupAffine(codes, *np.ones((2, 1, 2), np.float16), 4)).codes
        expected = np.zeros((2, 16), np.uint8)
        expected[element // 32, element % 16] = 15 << (4 if element % 32 >= 16 else 0)
        assert np.array_equal(to_block_order(packed), expected)
        assert np.array_equal(unpack_codes(from_block_order(expected).reshape(1, -1), 4), codes)


def test_blocks_that_contradict_the_declared_group_are_refused() -> None:
    rng = np.random.default_rng(0)
    matrix = GroupAffine(rng.integers(0, 16, (2, 64), np.uint8), *rng.random((2, 2, 2)).astype(np.float16), 4)
    with pytest.raises(UnsafeInputError, match="disagree about its scale"):
        decode("Q4_1", encode("Q4_1", PackedAffine.pack(matrix)), bits=4, group_size=64)
    with pytest.raises(UnsafeInputError, match="do not divide"):
        decode("Q4_1", encode("Q4_1", PackedAffine.pack(matrix)), bits=4, group_size=128)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_no_number_is_refused(bad: float) -> None:
    scale, offset = np.full((1, 1), bad, np.float16), np.zeros((1, 1), np.float16)
    with pytest.raises(InputError, match="NaN or infinite"):
        PackedAffine(np.zeros((1, 16), np.uint8), scale, offset, 4, 32)
    rows = np.zeros((1, 20), np.uint8)
    rows[0, :2] = scale.view(np.uint8)
    with pytest.raises(UnsafeInputError):
        decode("Q4_1", rows, bits=4, group_size=32)
