"""Epsilons and rotary angles of exports that have no operator for a norm or a rotation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qalora_export.verify.foreign.graph_settings import graph_differences
from qalora_export.verify.foreign.metadata import complete_config
from qalora_export.verify.foreign.onnx_folder import Graph
from tests.verify.foreign.conftest import Plain

FREQUENCIES = 500000.0 ** (-np.arange(0, 64, 2) / 64)


def spelled_out(folder: Path, epsilon: float, frequencies: np.ndarray, *, as_nodes: bool) -> Graph:
    """x·rsqrt(mean(x²) + ε) and cos(frequencies · position). as_nodes: its constants are nodes (TorchScript)."""
    constants = {
        "epsilon": np.array(epsilon, np.float32),
        "two": np.array(2, np.float32),
        "frequencies": frequencies.astype(np.float32).reshape(1, -1, 1),
    }
    tensors = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    made = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors] if as_nodes else []
    nodes = [
        *made,
        helper.make_node("Pow", ["x", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["mean"], axes=[-1]),
        helper.make_node("Add", ["mean", "epsilon"], ["sum"]),
        helper.make_node("Sqrt", ["sum"], ["root"]),
        helper.make_node("Div", ["x", "root"], ["y"]),
        helper.make_node("MatMul", ["frequencies", "positions"], ["angles"]),
        helper.make_node("Transpose", ["angles"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["turned", "turned"], ["both"], axis=-1),
        helper.make_node("Cos", ["both"], ["cos"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "positions")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "cos")]
    graph = helper.make_graph(nodes, "spelled out", inputs, outputs, [] if as_nodes else tensors)
    folder.mkdir(exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), folder / "model.onnx")
    return Graph(folder)


@pytest.mark.parametrize("as_nodes", [False, True])
def test_they_are_read_and_can_be_tried(as_nodes: bool, plain: Plain, tmp_path: Path) -> None:
    config = complete_config(plain.model)
    right = spelled_out(tmp_path / "right", 1e-5, FREQUENCIES, as_nodes=as_nodes)
    assert graph_differences(right, config, FREQUENCIES) == []
    other = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    wrong = spelled_out(tmp_path / "wrong", 1e-3, other, as_nodes=as_nodes)
    epsilon, rotary = graph_differences(wrong, config, FREQUENCIES)
    assert epsilon.said.startswith("epsilon of the norms is 0.001")
    assert rotary.said.startswith("rotary tables (radians per position) is [1.0, 0.749894,")
    assert epsilon.can_be_tried
    np.testing.assert_allclose(rotary.frequencies, other, rtol=1e-6)
