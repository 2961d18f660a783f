"""Zero points, undone as each writer took the 1 away; what is lost is seen."""

import numpy as np
import pytest

from qalora_export.quantization.gptq_zeros import Wraps, find_wraps, zero_points
from tests.quantization.gptq_packer import pack, pack_zeros


def random_zeros(bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, (5, 96))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_writer_is_undone_exactly(bits: int) -> None:
    zeros = random_zeros(bits)
    assert np.array_equal(zero_points(pack_zeros(zeros, bits, "gptq_v2"), bits, "stored"), zeros)
    rule = "per value" if bits == 3 else "per word"
    assert np.array_equal(zero_points(pack_zeros(zeros, bits, "gptq"), bits, rule), zeros)


def test_a_borrow_read_per_value_would_be_wrong() -> None:
    stored = pack_zeros(np.array([[0, 2, 1, 3] * 4]), 2, "gptq")
    assert (zero_points(stored, 2, "per word") == [0, 2, 1, 3] * 4).all()
    assert not (zero_points(stored, 2, "per value") == [0, 2, 1, 3] * 4).all()


def test_three_bits_as_gptqmodel_wrote_them_before_6_1() -> None:
    """It took these constants from whole words: range(0, n, 3), range(1, n, 3) and range(2, n, 3)."""
    zeros = random_zeros(3)
    words = pack(zeros.T, 3).T.copy().view(np.uint32)
    for first, constant in enumerate([0o4444444444, 0b10010010010010010010010010010010, 0o11111111111]):
        words[:, first::3] -= np.uint32(constant)
    assert np.array_equal(zero_points(words.view(np.int32), 3, "per word"), zeros)


def test_what_lies_above_an_all_ones_value_tells_the_writers_apart() -> None:
    def look(zeros: list[int], stored: str) -> Wraps:
        return find_wraps(pack_zeros(np.array([zeros]), 4, stored), 4)

    assert look([5, 5, 5, 5, 5, 5, 5, 5], "gptq") == Wraps()
    assert look([5, 5, 5, 5, 5, 5, 5, 0], "gptq") == look([5, 5, 5, 5, 5, 5, 5, 0], "autogptq") == Wraps(topmost=1)
    assert look([5, 0, 5, 5, 5, 5, 5, 5], "gptq") == Wraps(open=1)
    assert look([5, 0, 5, 5, 0, 5, 5, 5], "autogptq") == Wraps(covered=1, hidden=6)
    assert look([5, 5, 5, 5, 5, 5, 0, 1], "gptq") == Wraps(covered=1, hidden=1)


def test_three_bit_values_hide_what_lies_in_the_same_word() -> None:
    def look(index: int) -> Wraps:
        stored = np.full((32, 1), 3)
        stored[index] = 7
        return find_wraps(pack(stored, 3).T.copy(), 3)

    assert look(10) == look(21) == look(31) == Wraps(topmost=1)  # 10 and 21 straddle two words, 31 is the last
    assert look(9) == Wraps(covered=1, hidden=1)  # above it: the two low bits of value 10, of a stored 3
    assert look(0) == Wraps(open=1)
