"""Narrowing counts every changed value and never passes NaN, infinity or overflow."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qalora_export.errors import InputError
from qalora_export.grid import narrow


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-60000, 60000, width=32)))
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_counts_changed_values(dtype: type, source: np.ndarray) -> None:
    result = narrow(source, dtype, where="w")
    expected = sum(float(dtype(value)) != float(value) for value in source)
    assert (result.changed, result.total) == (expected, source.size)
    assert result.values.dtype == dtype
    np.testing.assert_array_equal(result.values.astype(np.float32), source.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_non_finite(value: float) -> None:
    with pytest.raises(InputError, match=r"NaN or infinite.*layer\.3"):
        narrow(np.array([1.0, value], np.float32), np.float16, where="layer.3")


def test_refuses_overflow_and_keeps_the_largest() -> None:
    with pytest.raises(InputError, match="65520 overflows float16"):
        narrow(np.array([1.0, -65520.0], np.float32), np.float16, where="w")
    assert narrow(np.array([65519.0], np.float32), np.float16, where="w").changed == 1


def test_widening_changes_nothing() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    assert narrow(halves, np.float32, where="w").changed == 0
    assert narrow(halves, np.float64, where="w").changed == 0
