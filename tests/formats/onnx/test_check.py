"""What export refuses is what the installed ONNX Runtime refuses, operator by operator, and nothing more."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from transformers import LlamaConfig

from qalora_export.errors import InputError
from qalora_export.formats.onnx.check import check_runnable
from qalora_export.formats.onnx.split_form import CONTAINER_BITS
from qalora_export.grid import BITS, GROUP_SIZES

CONFIG = LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict()
CONTEXT, POSITIONS = 8, 5


def takes(config: dict[str, Any]) -> bool:
    try:
        check_runnable(CONFIG | config, where="here")
    except InputError:
        return False
    return True


def runs(node: Any, tensors: dict[str, np.ndarray], constants: dict[str, np.ndarray]) -> bool:
    """Whether ONNX Runtime loads and runs a graph of one operator."""
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in tensors.items()
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph(
        [node], "g", values, outputs, [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    try:
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, tensors)
    except Exception:  # its exception classes have no other base in common
        return False
    return True


def attention_runs(size: int, heads: int, shared: int) -> bool:
    names = ["q", "k", "v", "past_k", "past_v", "last", "total", "cos", "sin"]
    settings = {"num_heads": heads, "kv_num_heads": shared, "do_rotary": 1}
    node = helper.make_node("GroupQueryAttention", names, ["y", "k2", "v2"], domain="com.microsoft", **settings)
    widths = {"q": heads * size, "k": shared * size, "v": shared * size}
    tensors = {name: np.ones((1, POSITIONS, width), np.float32) for name, width in widths.items()}
    tensors |= {name: np.zeros((1, shared, 0, size), np.float32) for name in ("past_k", "past_v")}
    tensors |= {"last": np.array([POSITIONS - 1], np.int32), "total": np.array(POSITIONS, np.int32)}
    table = np.ones((CONTEXT, size // 2), np.float32)
    return runs(node, tensors, {"cos": table, "sin": table})


def product_runs(bits: int, group_size: int) -> bool:
    columns, rows = 2 * group_size, 4
    settings = {"K": columns, "N": rows, "bits": bits, "block_size": group_size, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft", **settings)
    constants = {
        "codes": np.zeros((rows, 2, group_size * bits // 8), np.uint8),
        "scale": np.ones((rows, 2), np.float32),
    }
    return runs(node, {"x": np.ones((1, 3, columns), np.float32)}, constants)


@pytest.mark.parametrize("size", [8, 16, 20, 24, 40, 48, 64, 72, 80, 96, 100, 128, 160, 256])
def test_head_sizes(size: int) -> None:
    config = {"head_dim": size, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert takes(config) == attention_runs(size, 4, 2)


@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (9, 3), (14, 2), (71, 1), (6, 4), (3, 2)])
def test_heads_that_share_keys_and_values(heads: int, shared: int) -> None:
    config = {"head_dim": 16, "num_attention_heads": heads, "num_key_value_heads": shared}
    assert takes(config) == attention_runs(16, heads, shared)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_width_and_group_size_of_the_canonical_form_runs(bits: int, group_size: int) -> None:
    assert product_runs(CONTAINER_BITS[bits], group_size)


def test_what_onnx_runtime_does_not_take_is_seen_by_this_test() -> None:
    assert not product_runs(5, 32) and not product_runs(4, 48) and not product_runs(4, 512)
