"""A graph of any tool for kernels that do not round: products of float32 with the constants' own numbers.

ONNX Runtime fuses DequantizeLinear and MatMul into a kernel with int8 activations, and MatMulInteger rounds by itself.
So what these make of a constant is written into the graph as that constant, and an integer product becomes a MatMul.
What is rounded on its way through the graph (QuantizeLinear, DequantizeLinear) goes through unrounded. MatMulNBits
stays, at accuracy_level 1. A graph in float16 is run in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qalora_export.formats.onnx.exact import exact_variant
from qalora_export.formats.onnx.layout import graph_file
from qalora_export.verify.foreign.onnx_folder import Graph
from qalora_export.verify.foreign.onnx_widened import widen

if TYPE_CHECKING:
    import onnx

DATA = "exact.data"


def float_variant(graph: Graph, target: Path, *, ranges: bool = False) -> Path:
    """A complete folder at `target` that computes what `graph` does without rounding; returns `target`.

    ranges: activations are rounded as the graph says, in plain float32 arithmetic (Graph.rounds_to_ranges).
    """
    import onnx

    exact_variant(graph.folder, target)
    rounding = ("DequantizeLinear", "MatMulInteger")
    if not graph.is_half and not any(node.op_type in rounding for node in graph.model.graph.node):
        return target
    file = graph_file(target)
    model = onnx.load(file)
    _replace(graph, model, ranges=ranges)
    if graph.is_half:
        widen(model)
    onnx.save(model, file, save_as_external_data=True, location=DATA, size_threshold=1024)
    return target


def _replace(graph: Graph, model: onnx.ModelProto, *, ranges: bool) -> None:
    """In place. What reads nothing any more is left out, as a kernel for integers may be missing."""
    import onnx

    gone, halves = set[str](), _half(model)
    rounded = {node.output[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
    spelled = dict[str, list[onnx.NodeProto]]()  # output -> nodes in the place of what makes it
    for node in list(model.graph.node):
        name = node.output[0]
        if node.op_type == "DequantizeLinear" and (constant := graph.values.dequantized(node)) is not None:
            dtype = np.float16 if node.input[1] in halves else np.float32
            model.graph.initializer.append(_tensor(constant.values.astype(dtype), name))
            gone.add(name)
        elif node.op_type == "DequantizeLinear" and node.input[0] in rounded:
            spelled[name] = _through(graph, model, rounded[node.input[0]], node, ranges=ranges)
        elif node.op_type == "MatMulInteger" and (product := graph.values.integer_product(node)) is not None:
            weight = f"{node.input[1]}_float"
            model.graph.initializer.append(_tensor(product.weight.values, weight))
            last = next(each for each in model.graph.node if product.y in each.output)
            last.CopyFrom(onnx.helper.make_node("MatMul", [product.x, weight], [product.y], name=last.name))
    kept = [
        each for node in model.graph.node if node.output[0] not in gone for each in spelled.get(node.output[0], [node])
    ]
    while True:
        read = {name for node in kept for name in node.input} | {value.name for value in model.graph.output}
        used = [node for node in kept if any(name in read for name in node.output)]
        if len(used) == len(kept):
            break
        kept = used
    nodes = [type(node).FromString(node.SerializeToString()) for node in kept]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in read]
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in tensors]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)


def _through(
    graph: Graph, model: onnx.ModelProto, narrow: onnx.NodeProto, wide: onnx.NodeProto, *, ranges: bool
) -> list[onnx.NodeProto]:
    """What QuantizeLinear and DequantizeLinear make of a value: itself, or s·clip(round(x / s), low − z, high − z)."""
    import onnx

    x, y = narrow.input[0], wide.output[0]
    scale = graph.values.array(narrow.input[1]) if ranges else None
    zero = graph.values.array(narrow.input[2]) if len(narrow.input) > 2 else None
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype.kind not in "iu":
        return [onnx.helper.make_node("Identity", [x], [y])]
    low, high = (float(end) - float(zero.item()) for end in (np.iinfo(zero.dtype).min, np.iinfo(zero.dtype).max))
    numbers = {f"{y}/{name}": value for name, value in (("step", scale.item()), ("low", low), ("high", high))}
    model.graph.initializer.extend(_tensor(np.array(value, np.float32), name) for name, value in numbers.items())
    step, least, most = numbers
    steps = (
        ("Div", [x, step], f"{y}/scaled"),
        ("Round", [f"{y}/scaled"], f"{y}/codes"),
        ("Clip", [f"{y}/codes", least, most], f"{y}/clipped"),
        ("Mul", [f"{y}/clipped", step], y),
    )
    return [onnx.helper.make_node(kind, inputs, [output]) for kind, inputs, output in steps]


def _half(model: onnx.ModelProto) -> set[str]:
    import onnx

    return {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}


def _tensor(values: NDArray[np.floating], name: str) -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.ascontiguousarray(values), name)
