"""Quantized matrices with the numbers that break things: subnormal, zero, -0, largest fp16, negative."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qalora_export.grid import GroupAffine

EXTREMES = np.array([0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, 1.0, -1.0, 0.1], np.float16)


def finite_fp16(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Any finite fp16 bit pattern, the extremes often."""
    bits = st.one_of(
        st.sampled_from([int(value) for value in EXTREMES.view(np.uint16)]),
        st.integers(0, 0x7BFF),  # non-negative, up to 65504
        st.integers(0x8000, 0xFBFF),
    )
    return hnp.arrays(np.uint16, shape, elements=bits).map(lambda raw: raw.view(np.float16))


@st.composite
def matrices(draw: st.DrawFn, bits: tuple[int, ...] = (2, 3, 4), sym: bool = False) -> GroupAffine:
    """GroupAffine over bits, g in {32, 64, 128} and small shapes; sym: offset = -2^(bits-1)·scale."""
    width, group = draw(st.sampled_from(bits)), draw(st.sampled_from((32, 64, 128)))
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    codes = draw(hnp.arrays(np.uint8, (rows, groups * group), elements=st.integers(0, 2**width - 1)))
    scale = draw(finite_fp16((rows, groups)))
    if sym:
        middle = 2 ** (width - 1)
        limit = np.float16(65504 / middle)
        scale = np.clip(scale, -limit, limit)
        return GroupAffine(codes, scale, (-middle * scale.astype(np.float32)).astype(np.float16), width)
    return GroupAffine(codes, scale, draw(finite_fp16((rows, groups))), width)
