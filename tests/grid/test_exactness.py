"""Bits are compared, not numbers."""

import ml_dtypes
import numpy as np
import pytest

from qalora_export.grid import Differences, difference, differing
from tests.qalora.layers import random_matrix


def test_counts_every_differing_element() -> None:
    left = np.zeros((4, 5), np.float16)
    right = left.copy()
    right[0, 0], right[3, 4] = 1, 2
    assert differing(left, left.copy()) == 0
    assert differing(left, right) == 2


def test_signed_zero_differs_and_equal_nan_does_not() -> None:
    assert differing(np.array([0.0]), np.array([-0.0])) == 1
    assert differing(np.array([np.nan]), np.array([np.nan])) == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64, ml_dtypes.bfloat16, np.bool_])
def test_works_for_every_dtype_and_order(dtype: type) -> None:
    left = np.arange(12).reshape(3, 4).astype(dtype)
    assert differing(left, np.asfortranarray(left)) == 0
    assert differing(left.T, left.T.copy()) == 0


def test_another_shape_or_dtype_differs_everywhere() -> None:
    assert differing(np.zeros(4, np.uint8), np.zeros(4, np.int8)) == 4
    assert differing(np.zeros((2, 2)), np.zeros(4)) == 4
    assert differing(np.zeros(0), np.zeros(0, np.uint8)) == 1


def test_matrices_are_compared_field_by_field() -> None:
    left, right = random_matrix(4, 64), random_matrix(4, 64)
    assert difference(left, right) == Differences(0, 0, 0)
    right.codes[0, 0] ^= 1
    right.offset[1] += 1
    assert difference(left, right) == Differences(1, 0, 2)
    assert (difference(left, right) + Differences(1, 1, 1)).total == 6
