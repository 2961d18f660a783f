"""Canonical ↔ ONNX: 0 differing values, judged by the onnx package, by numpy and by ONNX Runtime's own kernels."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from hypothesis import given, settings
from onnx.external_data_helper import load_external_data_for_model

from qalora_export.formats.onnx.layout import graph_file
from qalora_export.formats.onnx.read import read_back
from qalora_export.grid import GroupAffine, difference
from qalora_export.verify.runtimes.onnx_dequantize import runtime_dequantized
from tests.formats.onnx.helpers import LINEAR, linear_folder, matrices, proto, run_here, run_linear


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_read_back_finds_no_difference(matrix: GroupAffine) -> None:
    with tempfile.TemporaryDirectory() as name:
        linear_folder(Path(name), matrix)
        contents = read_back(Path(name) / "onnx")
        assert contents.modules == {LINEAR: (matrix.bits, matrix.group_size)}
        assert difference(matrix, contents.group_affine(LINEAR)).total == 0


@settings(max_examples=30, deadline=None)
@given(matrices())
def test_the_onnx_package_and_numpy_alone_agree(matrix: GroupAffine) -> None:
    """No reader of ours: onnx loads the data, four lines of numpy undo the layout."""
    with tempfile.TemporaryDirectory() as name:
        form = linear_folder(Path(name), matrix)
        model = proto(Path(name) / "onnx")
        load_external_data_for_model(model, str(Path(name) / "onnx/onnx"))
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    bits = np.unpackbits(arrays[f"{LINEAR}.codes"], axis=-1, bitorder="little")
    codes = np.packbits(bits.reshape(*matrix.shape, form.container), axis=-1, bitorder="little")[..., 0]
    assert np.array_equal(codes, matrix.codes)
    assert arrays[f"{LINEAR}.scale"].tobytes() == matrix.scale.tobytes()
    zero = np.full((*matrix.scale.shape, 1), 2 ** (form.container - 1), np.float64)
    if f"{LINEAR}.zero_points" in arrays:
        bits = np.unpackbits(arrays[f"{LINEAR}.zero_points"], axis=-1, bitorder="little")
        lanes = np.packbits(bits.reshape(len(bits), -1, form.container), axis=-1, bitorder="little")
        zero = lanes[:, : zero.shape[1]].astype(np.float64)
    rest = arrays[f"{LINEAR}.remainder"].astype(np.float64) if form.remainder else 0.0
    assert arrays.get(f"{LINEAR}.remainder", np.empty(0, "f2")).dtype.name == (form.remainder or "float16")
    offset = rest - zero[..., 0] * matrix.scale.astype(np.float64)
    assert np.array_equal(offset, matrix.offset.astype(np.float64))


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_onnx_runtime_dequantizes_to_the_canonical_weight(matrix: GroupAffine) -> None:
    with tempfile.TemporaryDirectory() as name:
        linear_folder(Path(name), matrix)
        ((module, weight),) = runtime_dequantized(Path(name) / "onnx", Path(name), run=run_here)
    assert module == LINEAR
    assert np.array_equal(weight, matrix.dequantize())  # 0 ulp


@settings(max_examples=30, deadline=None)
@given(matrices(ordinary=True))
def test_the_graph_computes_the_linear_layer(matrix: GroupAffine) -> None:
    """Against numpy in float64, one position and several."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        linear_folder(Path(name), matrix)
        for positions in (1, 5):
            x = rng.normal(size=(2, positions, matrix.shape[1])).astype(np.float32)
            expected = x.astype(np.float64) @ matrix.dequantize().astype(np.float64).T
            found = run_linear(Path(name) / "onnx", x)
            magnitude = np.abs(x).astype(np.float64) @ np.abs(matrix.dequantize()).astype(np.float64).T
            assert (np.abs(found - expected) <= 1e-5 * magnitude).all()


def test_folders_of_earlier_versions_are_still_read(tmp_path: Path) -> None:
    """They held m itself and one z for the matrix, and the graph made R = m + z·s of it."""
    scale = np.full((4, 2), 0.25, np.float16)
    offset = np.array([[-1.9375, -2.0625]] * 4, np.float16)  # −m/s is 7.75 and 8.25: z is 8
    matrix = GroupAffine(np.arange(4 * 64, dtype=np.uint8).reshape(4, 64) % 16, scale, offset, 4)
    linear_folder(tmp_path, matrix)
    model = proto(tmp_path / "onnx")
    (cast,) = (node for node in model.graph.node if node.input[0] == f"{LINEAR}.remainder")
    scale32 = next(node.output[0] for node in model.graph.node if node.input[0] == f"{LINEAR}.scale")
    (rest,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{LINEAR}.remainder")
    rest.CopyFrom(onnx.numpy_helper.from_array(offset, f"{LINEAR}.offset"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(8), "zero_8"))
    cast.input[0], made = f"{LINEAR}.offset", cast.output[0]
    cast.output[0] = "m"
    nodes = list(model.graph.node)
    at = nodes.index(cast) + 1
    shift = [
        onnx.helper.make_node("Mul", [scale32, "zero_8"], ["z·s"]),
        onnx.helper.make_node("Add", ["m", "z·s"], [made]),
    ]
    scales = [node for node in nodes[at:] if node.output[0] == scale32]
    ordered = [*nodes[:at], *scales, *shift, *(node for node in nodes[at:] if node not in scales)]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    onnx.save(model, graph_file(tmp_path / "onnx"))
    contents = read_back(tmp_path / "onnx")
    assert difference(matrix, contents.group_affine(LINEAR)).total == 0
    ((_, weight),) = runtime_dequantized(tmp_path / "onnx", tmp_path, run=run_here)
    assert np.array_equal(weight, matrix.dequantize())
