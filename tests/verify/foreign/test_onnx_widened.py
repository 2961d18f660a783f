"""A float16 graph in float32: every number stays, and nothing in float16 is left that a runtime would round by."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from qalora_export.verify.foreign.onnx_widened import widen

WEIGHT = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float16)


def half_model() -> onnx.ModelProto:
    """y = float16(x) @ W + a constant of a body of If, all in float16."""
    value, half = helper.make_tensor_value_info, TensorProto.FLOAT16
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float16([0.1]), "c"))
    body = helper.make_graph([constant], "body", [], [value("c", half, [1])])
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=half),
        helper.make_node("MatMul", ["narrow", "w"], ["product"]),
        helper.make_node("If", ["yes"], ["added"], then_branch=body, else_branch=body),
        helper.make_node("Add", ["product", "added"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "half",
        [value("x", TensorProto.FLOAT, [1, 64]), value("yes", TensorProto.BOOL, [])],
        [value("y", half, [1, 8])],
        [numpy_helper.from_array(WEIGHT, "w")],
        value_info=[value("product", half, [1, 8])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def answer(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x, "yes": np.array(True)})[0])


def test_sums_are_not_rounded_and_numbers_are_the_same() -> None:
    model, x = half_model(), np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    wanted = x.astype(np.float64) @ WEIGHT.astype(np.float64) + float(np.float16(0.1))
    assert np.abs(answer(model, x) - wanted).max() > 1e-4
    widen(model)
    onnx.checker.check_model(model, full_check=True)
    found = answer(model, x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert str(model).count("FLOAT16") == 0
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), WEIGHT.astype(np.float32))
