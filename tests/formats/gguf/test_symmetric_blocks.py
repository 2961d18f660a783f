"""Symmetric grids ↔ their block types: nothing differs, judged by the gguf package and by ggml's own bit twiddling."""

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.gguf.types import BLOCK_TYPES, Q4_K, Q6_K, exact_type
from qalora_export.grid import GroupAffine, PackedAffine, SymmetricLevels, centred, difference, differing
from qalora_export.grid.named import SUPER_BLOCK
from tests.formats.gguf.test_types import oracle
from tests.grid.test_symmetric_levels import symmetric_matrix

TYPES = {name: kind for name, kind in BLOCK_TYPES.items() if getattr(kind.grid, "symmetric", False)}
every_type = pytest.mark.parametrize("kind", list(TYPES.values()), ids=list(TYPES))


@every_type
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bytes_are_read_as_the_gguf_package_reads_them(kind: Any, seed: int) -> None:
    """To the sign of zero; and they go back."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (3, 2 * kind.block_bytes), np.uint8).view(kind.layout)
    blocks["d"] = rng.normal(size=blocks.shape).astype(np.float16).view("<u2")
    stored = blocks.view(np.uint8)
    bits, group_size = kind.native()
    matrix = kind.unpack(stored, bits=bits, group_size=group_size)
    assert differing(dequantize(stored, GGMLQuantizationType[kind.name]), centred(matrix.unpack())) == 0
    codes, scale, offset = oracle(kind, stored)
    assert np.array_equal(matrix.unpack().codes, codes.reshape(3, -1))
    assert np.array_equal(matrix.scale, scale.reshape(3, -1))
    assert np.array_equal(matrix.offset, offset.reshape(3, -1))
    assert np.array_equal(kind.pack(matrix), stored)


@every_type
def test_round_trip_of_a_matrix(kind: Any) -> None:
    matrix = symmetric_matrix(rows=5, blocks=3, seed=1, grid=kind.grid)
    rows = kind.pack(PackedAffine.pack(matrix))
    assert rows.shape == (5, 3 * kind.block_bytes)
    assert (
        difference(kind.unpack(rows, bits=kind.grid.bits, group_size=kind.grid.group_size).unpack(), matrix).total == 0
    )


@every_type
def test_every_bit_of_every_code_goes_to_its_place(kind: Any) -> None:
    levels = SymmetricLevels(kind.grid, np.ones((1, kind.grid.groups), np.int8), np.ones((1, 1), np.float16))
    for element in range(SUPER_BLOCK):
        for bit in range(kind.grid.bits):
            codes = np.zeros((1, SUPER_BLOCK), np.uint8)
            codes[0, element] = 1 << bit
            found = oracle(kind, kind.pack(PackedAffine.pack(GroupAffine.on_levels(codes, levels))))
            assert np.array_equal(found[0], codes)


def test_what_is_refused() -> None:
    matrix = PackedAffine.pack(symmetric_matrix(rows=1, blocks=1))
    with pytest.raises(InputError, match="grid q6_k does not go into Q4_K"):
        Q4_K.pack(matrix)
    assert [name for name, kind in BLOCK_TYPES.items() if kind.holds(matrix)] == ["Q6_K"]
    assert exact_type(6, lambda: matrix, where="w", grid=matrix.grid) is Q6_K
    rows = Q6_K.pack(matrix)
    with pytest.raises(UnsafeInputError, match="6 bits in groups of 32 declared"):
        Q6_K.unpack(rows, bits=6, group_size=32)
    rows.view(Q6_K.layout)["d"] = np.float16(np.nan).view("<u2")
    with pytest.raises(UnsafeInputError, match="NaN or infinite"):
        Q6_K.unpack(rows, bits=6, group_size=16)
