"""Canonical ↔ ONNX: 0 differing values, judged by the onnx package, by numpy and by ONNX Runtime's own kernels."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from hypothesis import given, settings
from onnx.external_data_helper import load_external_data_for_model

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
    if form.has_remainder:
        assert arrays[f"{LINEAR}.offset"].tobytes() == matrix.offset.tobytes()
    else:
        assert f"{LINEAR}.offset" not in arrays


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
