"""PackedAffine: packing is GroupAffine's, the fast fp16 checks are numpy's, differences are counted the same."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qalora_export.errors import InputError
from qalora_export.grid import (
    GroupAffine,
    PackedAffine,
    difference,
    fp16_is_finite,
    fp16_largest,
    packed_difference,
)

ANY_FP16 = hnp.arrays(np.uint16, st.integers(0, 40)).map(lambda bits: bits.view(np.float16))


@given(values=ANY_FP16)
def test_fast_fp16_checks_equal_numpy(values: np.ndarray) -> None:
    assert fp16_is_finite(values) == bool(np.isfinite(values).all())
    if np.isfinite(values).all():
        assert fp16_largest(values) == float(np.abs(values).max(initial=0))
    else:
        assert not fp16_largest(values) < np.inf


def matrix(bits: int, seed: int = 0) -> GroupAffine:
    rng = np.random.default_rng(seed)
    scale, offset = rng.random((2, 3, 2)).astype(np.float16)
    return GroupAffine(rng.integers(0, 2**bits, (3, 64), np.uint8), scale, offset, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_round_trip_and_differences(bits: int) -> None:
    one, other = matrix(bits), matrix(bits, seed=1)
    assert difference(PackedAffine.pack(one).unpack(), one).total == 0
    assert packed_difference(PackedAffine.pack(one), PackedAffine.pack(one)).total == 0
    assert packed_difference(PackedAffine.pack(one), PackedAffine.pack(other)) == difference(one, other)
    mixed = dataclasses.replace(one, offset=other.offset)
    assert packed_difference(PackedAffine.pack(one), PackedAffine.pack(mixed)) == difference(one, mixed)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    good = PackedAffine.pack(matrix(4))
    with pytest.raises(InputError, match="do not belong together"):
        dataclasses.replace(good, codes=good.codes[:, :-1])
    with pytest.raises(InputError, match="do not belong together"):
        dataclasses.replace(good, offset=good.offset[:1])
