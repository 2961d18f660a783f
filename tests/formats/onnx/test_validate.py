"""Hostile ONNX folders are refused with UnsafeInputError before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from qalora_export.errors import InputError, QaloraError, UnsafeInputError
from qalora_export.formats.onnx.read import MODULES_KEY, read_back
from qalora_export.formats.onnx.validate import read_model
from tests.formats.onnx.helpers import LINEAR, proto


def tensor(model: onnx.ModelProto, part: str = "codes") -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == f"{LINEAR}.{part}")


def external(key: str, value: str, part: str = "codes") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in tensor(model, part).external_data if entry.key == key).value = value

    return change


def dims(*shape: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor(model).dims[:] = shape

    return change


def duplicate(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(tensor(model))


def second_location(model: onnx.ModelProto) -> None:
    tensor(model).external_data.add(key="location", value="other.data")


def short_inline(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.TensorProto(name="t", data_type=1, dims=[1000], raw_data=b"1234"))


def empty_inline(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.TensorProto(name="t", data_type=1, dims=[1 << 39]))


def hidden_in_an_attribute(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(np.zeros(4, np.float32)))
    node.attribute[0].t.dims[:] = [4, 1 << 30]
    model.graph.node.append(node)


def hidden_in_a_function(model: onnx.ModelProto) -> None:
    node = helper.make_node(
        "Constant",
        [],
        ["t"],
        value=onnx.TensorProto(
            data_type=1,
            dims=[1],
            data_location=onnx.TensorProto.EXTERNAL,
            external_data=[
                onnx.StringStringEntryProto(key="location", value="/etc/passwd"),
                onnx.StringStringEntryProto(key="length", value="4"),
            ],
        ),
    )
    model.functions.append(helper.make_function("local", "f", [], ["t"], [node], [helper.make_opsetid("", 24)]))


def sparse(model: onnx.ModelProto) -> None:
    values, indices = numpy_helper.from_array(np.ones(1, np.float32)), numpy_helper.from_array(np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 40]))


def unknown_type(model: onnx.ModelProto) -> None:
    tensor(model).data_type = 777


def strings(model: onnx.ModelProto) -> None:
    tensor(model).data_type = onnx.TensorProto.STRING


ATTACKS = {
    "parent folder": external("location", "../secret"),
    "absolute path": external("location", "/etc/passwd"),
    "backslash": external("location", "..\\secret"),
    "drive letter": external("location", "C:secret"),
    "offset beyond the file": external("offset", "1000000"),
    "offset near 2^64": external("offset", str(2**64 - 1)),
    "negative offset": external("offset", "-4096"),
    "offset is no number": external("offset", "0x10"),
    "length too short": external("length", "1"),
    "length beyond the file": external("length", str(2**40)),
    "shape larger than the data": dims(8, 2, 1 << 20),
    "absurd shape": dims(1 << 40, 1 << 40),
    "negative dim": dims(-1, 2, 16),
    "two initializers of one name": duplicate,
    "two locations": second_location,
    "inline bytes too few": short_inline,
    "inline tensor without data": empty_inline,
    "attribute tensor": hidden_in_an_attribute,
    "function tensor": hidden_in_a_function,
    "sparse initializer": sparse,
    "unknown data type": unknown_type,
    "strings": strings,
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_lying_tensors_are_unsafe(victim: Path, attack: Callable[[onnx.ModelProto], None]) -> None:
    model = proto(victim)
    attack(model)
    (victim / "onnx/model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafeInputError):
        read_model(victim)


def test_intact_folder_passes(one_linear: Path) -> None:
    assert len(read_model(one_linear).graph.initializer) >= 4


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_linked_data_file_is_unsafe(victim: Path, link: Callable[[Path, Path], None]) -> None:
    (victim / "onnx/model.onnx_data").rename(victim.parent / "elsewhere")
    link(victim.parent / "elsewhere", victim / "onnx/model.onnx_data")
    with pytest.raises(UnsafeInputError, match="link"):
        read_model(victim)


def test_truncated_data_file_is_unsafe(victim: Path) -> None:
    data = (victim / "onnx/model.onnx_data").read_bytes()
    (victim / "onnx/model.onnx_data").write_bytes(data[:-1])
    with pytest.raises(UnsafeInputError, match="ends at byte"):
        read_model(victim)


def test_two_graphs_in_one_folder_are_unsafe(victim: Path) -> None:
    """Hosts would run different ones."""
    shutil.copyfile(victim / "onnx/model.onnx", victim / "model.onnx")
    with pytest.raises(UnsafeInputError, match="two graphs"):
        read_model(victim)


def test_a_link_in_the_place_of_the_graph_s_folder_is_unsafe(victim: Path) -> None:
    (victim / "onnx").rename(victim.parent / "elsewhere")
    (victim / "onnx").symlink_to(victim.parent / "elsewhere", target_is_directory=True)
    with pytest.raises(UnsafeInputError, match="symbolic link"):
        read_model(victim)


def test_missing_files_and_garbage_are_bad_input(victim: Path, tmp_path: Path) -> None:
    (victim / "onnx/model.onnx_data").unlink()
    with pytest.raises(InputError, match="not found"):
        read_model(victim)
    (victim / "onnx/model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="not an ONNX model"):
        read_model(victim)
    (victim / "onnx/model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="no graph"):
        read_model(victim)
    with pytest.raises(InputError, match=r"no onnx/model\.onnx here"):
        read_model(tmp_path / "nowhere")


@pytest.mark.parametrize("modules", ['{"a": [4, 32]}', '{"x": [5, 32]}', '{"x": 1}', "[]", '{"x": [4, 0]}'])
def test_metadata_that_contradicts_the_graph_is_unsafe(victim: Path, modules: str) -> None:
    model = proto(victim)
    next(entry for entry in model.metadata_props if entry.key == MODULES_KEY).value = modules
    (victim / "onnx/model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafeInputError):
        read_back(victim)


@pytest.mark.parametrize("claim", [[4, 32], [2, 32], [3, 64]])
def test_wrong_bits_or_group_size_are_found(victim: Path, claim: list[int]) -> None:
    """A 3-bit tensor in a 4-bit container claims something else; 4 bits would fit, so its codes decide nothing."""
    model = proto(victim)
    next(entry for entry in model.metadata_props if entry.key == MODULES_KEY).value = json.dumps({LINEAR: claim})
    (victim / "onnx/model.onnx").write_bytes(model.SerializeToString())
    contents = read_back(victim)
    if claim == [4, 32]:
        assert contents.group_affine(LINEAR).bits == 4  # a different matrix than the checkpoint's, which G0 compares
        return
    with pytest.raises(UnsafeInputError, match="MatMulNBits says"):
        contents.group_affine(LINEAR)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_bytes_never_escape_our_errors(
    one_linear: Path, tmp_path_factory: pytest.TempPathFactory, data
) -> None:
    raw = bytearray((one_linear / "onnx/model.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    target = tmp_path_factory.mktemp("fuzz")
    (target / "onnx").mkdir()
    shutil.copyfile(one_linear / "onnx/model.onnx_data", target / "onnx/model.onnx_data")
    (target / "onnx/model.onnx").write_bytes(raw)
    try:
        contents = read_back(target)
        for _, matrix in contents.matrices():
            assert matrix.shape[0] > 0
    except QaloraError:
        pass
    shutil.rmtree(target)
