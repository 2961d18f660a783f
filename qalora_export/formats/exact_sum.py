"""Sums of float32 numbers, and whether they were rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def exact_sum(left: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """left + right as float32, and where that is not the sum itself. Both are float32, or both float64.

    In float32 the error of a rounded sum is a float32 that follows from it without rounding (Knuth's TwoSum); two
    float64 are those of products whose sum float64 holds.
    """
    total = left + right
    if total.dtype == np.float32:
        back = total - left
        return total, ((left - (total - back)) + (right - back)) != 0
    rounded: NDArray[np.float32] = total.astype(np.float32)
    return rounded, rounded != total
