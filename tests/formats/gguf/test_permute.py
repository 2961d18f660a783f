"""Row order of q and k against llama.cpp's own formula, and codes, scale and offset moving together."""

import numpy as np
import pytest

from qalora_export.errors import InputError
from qalora_export.formats.gguf.permute import hf_order, row_order
from qalora_export.grid import GroupAffine
from tests.models import round_to_nearest


@pytest.mark.parametrize(("rows", "heads"), [(8, 1), (64, 4), (96, 3), (128, 2)])
def test_row_order_is_llama_cpps(rows: int, heads: int) -> None:
    expected = []
    for head in range(heads):
        size = rows // heads
        for pair in range(size // 2):  # llama.cpp rotates (2i, 2i+1), Transformers (i, i + size/2)
            expected += [head * size + pair, head * size + pair + size // 2]
    assert row_order(rows, heads).tolist() == expected
    assert row_order(rows, heads)[hf_order(rows, heads)].tolist() == list(range(rows))


def test_permutation_commutes_with_dequantization() -> None:
    matrix = round_to_nearest(np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32), 4, 32)
    order = row_order(64, 4)
    moved = GroupAffine(matrix.codes[order], matrix.scale[order], matrix.offset[order], matrix.bits)
    np.testing.assert_array_equal(moved.dequantize(), matrix.dequantize()[order])


def test_odd_heads_are_refused() -> None:
    with pytest.raises(InputError, match="heads"):
        row_order(6, 2)
