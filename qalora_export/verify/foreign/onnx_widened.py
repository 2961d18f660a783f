"""A graph in float16 as the same graph in float32: every number stays, no sum is rounded to 11 bits any more.

ONNX Runtime's CPU provider has float16 kernels for a part of the operators only and puts casts around the rest, on
which graphs made for a GPU may fail or run at another precision than there. What such a graph says is in its nodes and
numbers, and those are looked at in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def widen(model: onnx.ModelProto) -> None:
    """In place: float16 and bfloat16 initializers, constants, casts and declared types become float32.

    Whatever else has a type of its own (a function, an operator's dtype attribute) is changed alike; bodies of
    If, Loop and Scan too.
    """
    for graph in _graphs(model.graph):
        _widen(graph)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if body.node:
                    yield from _graphs(body)


def _widen(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _float32(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        declared = value.type.tensor_type
        if declared.elem_type in _halves():
            declared.elem_type = 1  # TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _halves():
                attribute.i = 1
            for tensor in (attribute.t, *attribute.tensors):
                _float32(tensor)


def _halves() -> tuple[int, int]:
    import onnx

    return onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def _float32(tensor: onnx.TensorProto) -> None:
    from onnx import numpy_helper

    if tensor.data_type in _halves():
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
