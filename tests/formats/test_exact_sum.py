"""exact_sum against fractions."""

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_export.formats.exact_sum import exact_sum

NUMBERS = st.floats(-65504, 65504, width=16)


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(0, 255)), min_size=1, max_size=20))
def test_it_says_where_float32_rounds(cases: list[tuple[float, float, int]]) -> None:
    m, s, z = (np.array(part) for part in zip(*cases, strict=True))
    for wide in (np.float32, np.float64):
        total, inexact = exact_sum(m.astype(wide), z.astype(wide) * s.astype(wide))
        assert total.dtype == np.float32
        for (offset, scale, zero), found, rounded in zip(cases, total.tolist(), inexact.tolist(), strict=True):
            exact = Fraction(offset) + zero * Fraction(scale)
            assert rounded == (Fraction(found) != exact)
            assert found == float(np.float32(float(exact)))
