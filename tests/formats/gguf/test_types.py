"""canonical ↔ GGUF blocks: nothing differs, judged by the gguf package's dequantizer and by the oracle of each type.

Every registered type is tried, and a type that is registered here only, to show that it takes one class.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.gguf import block_type
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.read import read_back, runtime_dequantized
from qalora_export.formats.gguf.remainder import remainder
from qalora_export.formats.gguf.types import (
    BLOCK_TYPES,
    PLAIN_TYPES,
    Q4_0,
    Q4_1,
    Q8_0,
    QK,
    BlockType,
    exact_type,
)
from qalora_export.formats.gguf.validate import read_header
from qalora_export.grid import AFFINE16, GroupAffine, PackedAffine, difference, differing
from qalora_export.inspection.view import byte_table, open_view
from qalora_export.recipe import GgufSettings
from qalora_export.verify.runtimes.twin import write_twin
from tests.formats.gguf.strategies import finite_fp16, matrices
from tests.formats.gguf.test_export import variant

every_type = pytest.mark.parametrize("kind", list(BLOCK_TYPES.values()), ids=list(BLOCK_TYPES))
FREE = {name: kind for name, kind in BLOCK_TYPES.items() if kind.grid is AFFINE16}  # the others: test_super_blocks.py
every_free_type = pytest.mark.parametrize("kind", list(FREE.values()), ids=list(FREE))


def oracle(kind: type[BlockType], rows: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """codes (out, in), d and m per block (out, in/32), one block at a time."""
    blocks = [
        [kind.slow_unpack(row[start : start + kind.block_bytes]) for start in range(0, len(row), kind.block_bytes)]
        for row in map(bytes, rows)
    ]
    codes = np.array([[code for block in row for code in block[0]] for row in blocks])
    return codes, *(np.array([[block[part] for block in row] for row in blocks]) for part in (1, 2))


def fitting(kind: type[BlockType]) -> st.SearchStrategy[GroupAffine]:
    """Matrices that the type holds exactly: codes of its bits, the offset of its zero."""

    def made(matrix: GroupAffine) -> GroupAffine:
        codes = (matrix.codes & np.uint8(2**kind.code_bits - 1)) + np.uint8(kind.first)
        if kind.zero is None:
            return GroupAffine(codes, matrix.scale, matrix.offset, matrix.bits)
        zero = kind.zero - kind.shift(matrix.bits)
        limit = np.float16(65504 / kind.zero)
        scale = np.clip(matrix.scale, -limit, limit)
        return GroupAffine(codes, scale, (-zero * scale.astype(np.float32)).astype(np.float16), matrix.bits)

    return matrices(kind.bits).map(made)


@every_type
def test_its_numbers_are_those_of_the_gguf_package(kind: type[BlockType]) -> None:
    assert kind.id == GGMLQuantizationType[kind.name]
    assert GGML_QUANT_SIZES[GGMLQuantizationType(kind.id)] == (kind.block_size, kind.block_bytes)


@pytest.mark.parametrize("kind", list(PLAIN_TYPES.values()), ids=list(PLAIN_TYPES))
def test_plain_types_are_those_of_the_gguf_package(kind: Any) -> None:
    assert kind.id == GGMLQuantizationType[kind.name]
    assert GGML_QUANT_SIZES[GGMLQuantizationType(kind.id)] == (1, kind.dtype.itemsize)


def check_round_trip(kind: type[BlockType], matrix: GroupAffine) -> None:
    """pack against the oracle and the gguf package; unpack against what was packed, bit for bit."""
    rows = kind.pack(PackedAffine.pack(matrix))
    assert rows.shape == (matrix.shape[0], kind.nbytes(matrix.shape) // matrix.shape[0])
    codes, d, m = oracle(kind, rows)
    shift = kind.shift(matrix.bits)
    assert np.array_equal(codes, matrix.codes + shift)
    m += shift * d  # of canonical code 0
    span = matrix.group_size // QK
    assert differing(d.astype(np.float16), np.repeat(matrix.scale, span, axis=1)) == 0
    np.testing.assert_array_equal(m.astype(np.float16), np.repeat(matrix.offset, span, axis=1))
    back = kind.unpack(rows, bits=matrix.bits, group_size=matrix.group_size)
    assert (back.bits, back.group_size) == (matrix.bits, matrix.group_size)
    assert difference(matrix, back.unpack()).total == 0
    assert kind.holds(PackedAffine.pack(matrix))
    np.testing.assert_array_equal(dequantize(rows, GGMLQuantizationType(kind.id)), matrix.dequantize())


@every_free_type
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip_oracle_and_the_gguf_package(kind: type[BlockType], data: st.DataObject) -> None:
    check_round_trip(kind, data.draw(fitting(kind)))


@every_type
def test_slabs_of_rows_give_the_same_bytes(kind: type[BlockType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes change places a slab of rows at a time; one slab or many, the blocks and what is read back are the same."""
    rows, (bits, group) = 7, kind.native()
    stored = np.random.default_rng(0).integers(0, 256, (rows, 2 * kind.nbytes((1, 256))), np.uint8)
    for part in {"d", "m", "dmin"} & set(kind.layout.names or ()):
        stored.view(kind.layout)[part] = np.float16(0.5).view("<u2")
    whole = kind.unpack(stored, bits=bits, group_size=group)
    assert np.array_equal(kind.pack(whole), stored)
    monkeypatch.setattr(block_type, "SLAB_BYTES", 3 * whole.codes.shape[1])
    assert len(list(block_type.slabs(whole.codes))) == 3
    parts = kind.unpack(stored, bits=bits, group_size=group)
    assert difference(whole.unpack(), parts.unpack()).total == 0
    assert np.array_equal(kind.pack(whole), stored)


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_q4_1_dequantizes_to_the_very_bits(matrix: GroupAffine) -> None:
    assert differing(dequantize(Q4_1.pack(PackedAffine.pack(matrix)), Q4_1.id), matrix.dequantize()) == 0


@every_free_type
def test_every_code_goes_to_its_place(kind: type[BlockType]) -> None:
    """One code set at a time."""
    for element in range(2 * QK):
        codes = np.full((1, 2 * QK), kind.first, np.uint8)
        codes[0, element] += 2**kind.code_bits - 1
        scale, offset = np.ones((1, 2), np.float16), np.full((1, 2), -(kind.zero or 0), np.float16)
        matrix = GroupAffine(codes, scale, offset, kind.bits[-1])
        assert np.array_equal(oracle(kind, kind.pack(PackedAffine.pack(matrix)))[0], codes)


@settings(max_examples=80, deadline=None)
@given(matrices(bits=(2, 3, 4)))
def test_q4_0_and_remainder_are_the_matrix_whenever_the_remainder_is_exact(matrix: GroupAffine) -> None:
    """s·(q − z) + R in float32 equals s·q + m bit for bit, or remainder() refuses."""
    zero = Q4_0.implied_zero(matrix.bits)
    assert zero == 2 ** (matrix.bits - 1)
    try:
        rest = remainder(matrix.scale, matrix.offset, zero, where="w")
    except InputError:
        exact = matrix.offset.astype(np.float64) + zero * matrix.scale.astype(np.float64)
        assert (exact.astype(np.float32) != exact).any()
        return
    base = dequantize(Q4_0.pack(PackedAffine.pack(matrix)), GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(base + np.repeat(rest, matrix.group_size, axis=1), matrix.dequantize())


@settings(max_examples=50, deadline=None)
@given(finite_fp16((2, 2)), st.sampled_from((2, 3, 4)))
def test_a_realistic_remainder_is_exact(scale: NDArray[np.float16], bits: int) -> None:
    """Offsets within the range of the codes, as every quantizer makes them, leave an exact remainder."""
    offset = (-(2 ** (bits - 1)) * np.clip(scale, -4000, 4000).astype(np.float32)).astype(np.float16)
    matrix = GroupAffine(np.zeros((2, 64), np.uint8), np.clip(scale, -4000, 4000), offset, bits)
    assert remainder(matrix.scale, matrix.offset, 8, where="w").dtype == np.float32


def matrix(bits: int, group: int) -> PackedAffine:
    codes = np.zeros((2, 2 * group), np.uint8)
    return PackedAffine.pack(GroupAffine(codes, np.ones((2, 2), np.float16), np.full((2, 2), 3, np.float16), bits))


def test_the_type_that_holds_a_matrix_by_itself() -> None:
    for bits in (2, 3, 4):
        assert exact_type(bits, lambda: pytest.fail("its values do not matter"), where="w") is Q4_1
    symmetric = GroupAffine(np.zeros((1, 32), np.uint8), np.ones((1, 1), np.float16), np.float16([[-128]]), 8)
    assert exact_type(8, lambda: PackedAffine.pack(symmetric), where="w") is Q8_0
    assert exact_type(8, lambda: matrix(8, 32), where="w") is BLOCK_TYPES["Q5_1"]  # its codes end before 32
    assert not BLOCK_TYPES["Q5_0"].holds(PackedAffine.pack(symmetric))  # its code 0 is below 112
    with pytest.raises(InputError, match="code 0 does not fit in Q5_0"):
        BLOCK_TYPES["Q5_0"].pack(PackedAffine.pack(symmetric))


def test_what_gguf_cannot_hold_is_refused_with_the_formats_that_can() -> None:
    wide = matrix(8, 32)
    wide.codes[0, 0] = 32
    with pytest.raises(InputError, match="ONNX"):
        exact_type(8, lambda: wide, where="lm_head")
    with pytest.raises(InputError, match=r"group size 16.*ONNX"):
        Q4_1.pack(matrix(4, 16))
    with pytest.raises(InputError, match="8-bit codes do not go into Q4_1"):
        Q4_1.pack(matrix(8, 32))
    with pytest.raises(InputError, match="4-bit codes do not go into Q8_0"):
        Q8_0.pack(matrix(4, 32))


def test_blocks_that_contradict_the_declaration_are_unsafe() -> None:
    narrow = matrix(4, 32)
    narrow.scale[:, 1] = 2
    rows = Q4_1.pack(narrow)
    with pytest.raises(UnsafeInputError, match="disagree about its scale"):
        Q4_1.unpack(rows, bits=4, group_size=64)
    with pytest.raises(UnsafeInputError, match="do not divide"):
        Q4_1.unpack(rows, bits=4, group_size=128)
    with pytest.raises(UnsafeInputError, match="8-bit codes declared for Q4_1"):
        Q4_1.unpack(rows, bits=8, group_size=32)
    narrow.codes[0, 0] = 9
    with pytest.raises(UnsafeInputError, match="2 bits"):
        Q4_1.unpack(Q4_1.pack(narrow), bits=2, group_size=32)


def test_an_implied_offset_beyond_fp16_is_refused() -> None:
    wide = GroupAffine(np.zeros((1, 32), np.uint8), np.full((1, 1), 60000, np.float16), np.zeros((1, 1), np.float16), 4)
    with pytest.raises(InputError, match="overflows"):
        Q4_0.unpack(Q4_0.pack(PackedAffine.pack(wide)), bits=4, group_size=32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_free_type
def test_a_scale_that_is_no_number_is_refused(kind: type[BlockType], bad: float) -> None:
    rows = np.zeros((1, kind.block_bytes), np.uint8)
    rows[0, :2] = np.float16([bad]).view(np.uint8)
    with pytest.raises(UnsafeInputError, match="NaN or infinite"):
        kind.unpack(rows, bits=kind.bits[-1], group_size=32)


@pytest.fixture
def throwaway() -> Iterator[type[BlockType]]:
    """Q5_1 as somebody adding it would write it: d, m, the fifth bits as one word, the low nibbles as in Q4_1."""
    before = dict(BLOCK_TYPES)
    BLOCK_TYPES.pop("Q5_1", None)

    class Q5_1(BlockType):
        id, file_type = 7, 9
        code_bits, bits = 5, (8,)
        layout = np.dtype([("d", "<u2"), ("m", "<u2"), ("qh", "<u4"), ("qs", "u1", QK // 2)])

        @classmethod
        def put_codes(cls, blocks: NDArray[Any], codes: NDArray[np.uint8]) -> None:
            q = codes.reshape(*blocks.shape, QK)
            blocks["qh"] = ((q.astype(np.uint32) >> 4) << np.arange(QK, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
            blocks["qs"] = (q[..., : QK // 2] & 15) | (q[..., QK // 2 :] << 4)

        @classmethod
        def take_codes(cls, blocks: NDArray[Any]) -> NDArray[np.uint8]:
            low = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=-1)
            high = (blocks["qh"][..., None] >> np.arange(QK, dtype=np.uint32)) & 1
            return (low | (high << 4).astype(np.uint8)).reshape(len(blocks), -1)

        @classmethod
        def slow_unpack(cls, block: bytes) -> tuple[list[int], float, float]:
            d, m, qh = struct.unpack_from("<eeI", block)
            nibbles = [byte & 15 for byte in block[8:]] + [byte >> 4 for byte in block[8:]]
            return [nibble | (qh >> j & 1) << 4 for j, nibble in enumerate(nibbles)], d, m

    yield Q5_1
    BLOCK_TYPES.clear()
    BLOCK_TYPES.update(before)


def test_one_class_is_all_that_a_new_type_needs(
    throwaway: type[BlockType], tiny_canonical: Path, tmp_path: Path
) -> None:
    """Registered, a type round-trips and is written, validated, read back, dequantized, inspected and twinned."""
    rng = np.random.default_rng(0)
    for group in (32, 64, 128):
        scale, offset = rng.normal(size=(2, 3, 2)).astype(np.float16)
        check_round_trip(throwaway, GroupAffine(rng.integers(0, 32, (3, 2 * group), np.uint8), scale, offset, 8))
    with pytest.raises(InputError, match="code 32 does not fit in Q5_1"):
        throwaway.pack(PackedAffine(np.full((1, 32), 32, np.uint8), *np.ones((2, 1, 1), np.float16), 8, 32))

    source = CanonicalCheckpoint(tiny_canonical)
    expected = {module: five_bits(source.group_affine(module)) for module in source.modules}
    model = variant(tiny_canonical, tmp_path / "five.qalora", expected)
    file = tmp_path / "m.gguf"
    report = export_gguf(model, file, GgufSettings())  # reads back and compares every value
    assert report.types["Q5_1"] == len(expected)
    assert throwaway.id in {info.type for info in read_header(file).tensors}
    contents = read_back(file)
    assert contents.metadata["general.file_type"] == throwaway.file_type
    assert all(difference(contents.group_affine(module), wanted).total == 0 for module, wanted in expected.items())
    for module, weight in runtime_dequantized(file):
        np.testing.assert_array_equal(weight, expected[module].dequantize())
    assert byte_table(open_view(file))["8 bit, g 32"][0] == len(expected)
    assert write_twin(file, tmp_path / "twin.gguf") == len(contents.types)


def five_bits(matrix: GroupAffine) -> GroupAffine:
    """The same matrix with codes up to 31, in the canonical width that holds them."""
    return GroupAffine(matrix.codes * np.uint8(2) + np.uint8(1), matrix.scale, matrix.offset, 8)
