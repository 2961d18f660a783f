"""The one comparison: what it counts, what it names, and the three things it does not call a difference."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.contents import (
    FolderContents,
    compare,
    exported_names,
    ties_head,
    values_differing,
)
from qalora_export.grid import Differences, GroupAffine, PackedAffine, difference, differing
from tests.formats.gguf.strategies import matrices


@dataclass
class Artifact:
    """Contents in memory."""

    matrices: dict[str, GroupAffine] = field(default_factory=dict)
    plain: dict[str, NDArray[Any]] = field(default_factory=dict)
    opaque: Mapping[str, str] = field(default_factory=dict)
    offset_is_implied: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    unreadable: str = ""
    shift: int = 0

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        return {name: (matrix.bits, matrix.group_size) for name, matrix in self.matrices.items()}

    @property
    def others(self) -> list[str]:
        return list(self.plain)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.matrices[name].shape if name in self.matrices else self.plain[name].shape

    def stored(self, name: str) -> tuple[str, int]:
        return self.plain[name].dtype.name, self.plain[name].nbytes

    def packed(self, module: str, rows: slice = slice(None)) -> PackedAffine:
        if module == self.unreadable:
            raise UnsafeInputError("a scale is NaN")
        found = self.matrices[module]
        return PackedAffine.pack(GroupAffine(found.codes[rows], found.scale[rows], found.offset[rows], found.bits))

    def tensor(self, name: str, rows: slice = slice(None)) -> NDArray[Any]:
        return self.plain[name][rows] if self.plain[name].ndim else self.plain[name]

    def carried(self, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        return tensor + np.float32(self.shift) if self.shift else tensor


class Exported(Artifact):
    """The same in another format."""


def matrix(bits: int = 4, group: int = 32, rows: int = 300, seed: int = 0) -> GroupAffine:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (rows, 2 * group), np.uint8)
    scale, offset = rng.normal(size=(2, rows, 2)).astype(np.float16)
    return GroupAffine(codes, scale, offset, bits)


@given(matrices(bits=(2, 3, 4, 8)), st.data())
def test_counts_are_those_of_a_comparison_element_by_element(left: GroupAffine, data: st.DataObject) -> None:
    """The slow oracle: grid.difference over whole matrices; here rows come in blocks and codes are packed."""
    right = GroupAffine(left.codes.copy(), left.scale.copy(), left.offset.copy(), left.bits)
    for array in (right.codes, right.scale, right.offset):
        flat = array.reshape(-1)
        for index in data.draw(st.lists(st.integers(0, flat.size - 1), max_size=3)):
            flat[index] = 0
    found = compare(Artifact({"m": left}), Artifact({"m": right}))
    expected = difference(left, right)
    assert found.matrices == ({"m": expected} if expected.total else {})
    assert (found.total, found.equal, found.changes) == (expected.total, not expected.total, expected)
    assert (found.compared, found.values) == (1, left.codes.size + 2 * left.scale.size)


def test_blocks_of_rows_change_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = matrix(seed=0), matrix(seed=1)
    whole = compare(Artifact({"m": left}, {"t": left.scale}), Artifact({"m": right}, {"t": right.scale}))
    monkeypatch.setattr(
        "qalora_export.formats.contents.row_blocks", lambda rows, nbytes: (slice(i, i + 7) for i in range(0, rows, 7))
    )
    assert compare(Artifact({"m": left}, {"t": left.scale}), Artifact({"m": right}, {"t": right.scale})) == whole
    assert whole.matrices["m"] == difference(left, right)
    assert whole.tensors["t"] == differing(left.scale, right.scale)


def test_what_only_one_side_holds_is_named_and_counts() -> None:
    left = Artifact({"a": matrix(), "b": matrix()}, {"t": np.ones(5, np.float32)})
    right = Artifact({"b": matrix(), "c": matrix()}, {"u": np.ones(5, np.float32)}, {"k.weight": "Q6_K"})
    found = compare(left, right)
    size = matrix().codes.size + 2 * matrix().scale.size
    assert found.only_left == {"a": size, "t": 5}
    assert found.only_right == ["c", "u", "k.weight"]
    assert found.total == size + 5 + 3 and not found.equal
    assert "a (missing): " in found.describe()


def test_a_matrix_of_other_bits_or_groups_counts_with_all_its_values_and_says_so() -> None:
    found = compare(Artifact({"m": matrix(4, 64)}), Artifact({"m": matrix(8, 64)}))
    assert found.matrices["m"] == Differences(300 * 128, 600, 600)
    assert list(found.findings()) == ["m (it is (300, 128) of 8 bits in groups of 64)"]
    assert not compare(Artifact({"m": matrix(4, 64)}), Artifact({"m": matrix(4, 32)})).equal


def test_a_matrix_that_cannot_be_read_counts_with_all_its_values_and_says_why() -> None:
    found = compare(Artifact({"m": matrix()}), Artifact({"m": matrix()}, unreadable="m"))
    assert list(found.findings()) == ["m (unreadable: a scale is NaN)"]
    with pytest.raises(UnsafeInputError):  # the reference itself must be readable
        compare(Artifact({"m": matrix()}, unreadable="m"), Artifact({"m": matrix()}))


def test_a_sign_of_zero_differs_unless_one_side_does_not_store_it() -> None:
    left, right = (replace(matrix(), offset=np.full((300, 2), zero, np.float16)) for zero in (0.0, -0.0))
    assert compare(Artifact({"m": left}), Artifact({"m": right})).changes == Differences(0, 0, 600)
    assert compare(Artifact({"m": left}), Artifact({"m": right}, offset_is_implied=frozenset({"m"}))).equal
    assert compare(Artifact({"m": left}, offset_is_implied=frozenset({"m"})), Artifact({"m": right})).equal


def test_another_format_may_leave_optional_tensors_out_and_hold_others_otherwise() -> None:
    weights = np.arange(6, dtype=np.float16)
    left = Artifact({}, {"head": weights, "norm": weights}, optional=frozenset({"head"}))
    assert compare(left, Exported({}, {"norm": weights.astype(np.float32) + 1}, shift=1)).equal
    assert compare(Exported({}, {"norm": weights.astype(np.float32) + 1}, shift=1), left).equal
    assert compare(left, Exported({}, {"norm": weights.astype(np.float32)}, shift=1)).tensors == {"norm": 6}
    assert compare(left, Artifact({}, {"norm": weights})).only_left == {"head": 6}  # a copy must hold everything
    other = Exported({}, {"norm": weights, "head": weights + 1})
    assert compare(left, other).tensors == {"head": 6}  # optional, but there


def test_tensors_of_other_shapes_count_whole() -> None:
    left, right = Artifact({}, {"t": np.ones((2, 3))}), Artifact({}, {"t": np.ones((3, 2))})
    assert compare(left, right).tensors == {"t": 6}
    assert compare(Artifact({}, {"t": np.ones(())}), Artifact({}, {"t": np.zeros(())})).tensors == {"t": 1}


@pytest.mark.parametrize(
    ("left", "right", "count"),
    [
        (np.float16([1, 0.1]), np.float32([1, np.float16(0.1)]), 0),
        (np.float16([1, 0.1]), np.float32([1, 0.1]), 1),
        (np.float16([0.0]), np.float32([-0.0]), 1),
        (np.array([1, 3], ml_dtypes.bfloat16), np.float16([1, 3]), 0),
        (np.float32([np.nan]), np.float32([np.nan]), 0),
        (np.float64([1, np.nan]), np.float32([1, np.nan]), 0),
        (np.int32([1, 2]), np.float32([1, 3]), 1),
    ],
)
def test_values_of_other_dtypes_are_compared_after_an_exact_widening(
    left: NDArray[Any], right: NDArray[Any], count: int
) -> None:
    assert values_differing(left, right) == values_differing(right, left) == count


def test_a_tied_head_and_derived_buffers_need_not_be_exported(tmp_path: Path, tiny_canonical: Path) -> None:
    source = CanonicalCheckpoint(tiny_canonical)
    for equal in (True, False):
        tied = tmp_path / f"tied-{equal}"
        with CanonicalWriter(tied, source.config | {"tie_word_embeddings": True}, kind="base") as out:
            for name in source.plain_names():
                same = equal and name == "lm_head.weight"
                out.add(name, np.asarray(source.tensor("model.embed_tokens.weight" if same else name)))
            out.add("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(4, np.float32))
            for module in source.modules:
                out.add_quantized(module, source.group_affine(module))
        checkpoint = CanonicalCheckpoint(tied)
        assert ties_head(checkpoint.config)
        assert len(FolderContents(checkpoint).optional) == 2
        if equal:
            left_out = set(checkpoint.plain_names()) - set(exported_names(checkpoint))
            assert left_out == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
            continue
        with pytest.raises(InputError, match="weights differ"):
            exported_names(checkpoint)
    assert exported_names(source) == source.plain_names()


def test_a_folder_of_any_architecture_can_be_shown(tiny_model: Path) -> None:
    folder = ModelFolder(tiny_model)
    folder.config["architectures"] = ["SomethingElse"]
    contents = FolderContents(folder)
    assert compare(contents, FolderContents(ModelFolder(tiny_model))).equal
    with pytest.raises(InputError, match="no quantized"):
        contents.packed("lm_head")
